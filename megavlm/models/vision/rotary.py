"""Two-dimensional rotary positions of patches: half of a head's pairs turn with the row, half with the column.

Shape legend: N patches of all pictures, K head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavlm.config.schema import VisionConfig
from megavlm.models.vision.pictures import Grid


def rotary_tables(vision: VisionConfig, grids: Sequence[Grid], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (N, K) in fp32, picture after picture, row by row, in the half-split order of Llama.

    With vision.rotary_layout=shared rows and columns turn at the same frequencies (transformers 5.23, models/qwen2_vl); with
    alternating they take every other one of a single series (models/pixtral).
    """
    width = vision.hidden_size // vision.num_attention_heads
    exponent = torch.arange(0, width, 4, dtype=torch.float32, device=device) / width
    by_row = 1.0 / vision.rope_theta**exponent
    by_column = by_row if vision.rotary_layout == "shared" else 1.0 / vision.rope_theta ** (exponent + 2 / width)
    own = {grid: _angles(grid, by_row, by_column) for grid in set(grids)}
    angle = torch.cat([own[grid] for grid in grids])
    return angle.cos(), angle.sin()


def _angles(grid: Grid, by_row: torch.Tensor, by_column: torch.Tensor) -> torch.Tensor:
    """(rows x columns, K): the angles of a picture, the second half of a head's elements as the first."""
    rows, columns = (torch.arange(n, dtype=torch.float32, device=by_row.device) for n in grid)
    down = (rows[:, None] * by_row).unsqueeze(1).expand(-1, grid[1], -1)
    across = (columns[:, None] * by_column).unsqueeze(0).expand(grid[0], -1, -1)
    half = torch.cat([down, across], dim=-1).flatten(0, 1)
    return torch.cat([half, half], dim=-1)
