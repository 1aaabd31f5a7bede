"""Multimodal rotary positions (M-RoPE, https://arxiv.org/abs/2409.12191, section 2.1): time, row and column of each token.

A text token has one position on all three axes. The tokens of a picture share one time, and count rows and columns from where the text
before it ended; text goes on behind the largest of them. All of it follows from the batch, so every pipeline stage computes it alone.

Shape legend: S packed sequence, N visual tokens, F rotation pairs of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch

from megavlm.parallel.host import on_device
from megavlm_kernels.transfer import to_device

Grid = tuple[int, int]
"""(rows, columns) of visual tokens of a picture, after merging."""


def mrope_positions(positions_S: torch.Tensor, image_positions_N: torch.Tensor, grids: Sequence[Grid]) -> torch.Tensor:
    """int64 (3, S): time, row and column, as transformers 5.23 computes them for each sample alone (`get_rope_index`, models/qwen2_vl).

    Args:
        positions_S: 0, 1, 2, ... within each segment.
        image_positions_N: rows of visual tokens, ascending; those of a picture stand side by side.
        grids: of each picture, in order.

    Raises ValueError when the pictures have not as many tokens as there are placeholders.
    """
    counts = [rows * columns for rows, columns in grids]
    if sum(counts) != image_positions_N.numel():
        raise ValueError(
            f"{image_positions_N.numel()} image placeholders, but {len(grids)} pictures of {sum(counts)} visual tokens: the data were "
            "prepared for another model.vision or model.projector"
        )
    device, size = positions_S.device, positions_S.numel()
    count_I = on_device(counts, device)
    begin_I = image_positions_N[count_I.cumsum(0) - count_I]
    shift_I = on_device([position_shift([grid]) for grid in grids], device)
    # What pictures before a row have moved it, over the whole pack; less what stood before its segment.
    moved_S = positions_S.new_zeros(size + 1).index_add(0, begin_I + count_I, shift_I).cumsum(0)[:size]
    text_S = positions_S + moved_S - moved_S[torch.arange(size, device=device) - positions_S]
    begin_N = text_S[begin_I].repeat_interleave(count_I, output_size=sum(counts))
    down, across = (to_device(torch.cat([_axes(grid)[axis] for grid in grids]), device) for axis in (0, 1))
    positions_3S = text_S.repeat(3, 1)
    positions_3S[:, image_positions_N] = begin_N + torch.stack([torch.zeros_like(down), down, across])
    return positions_3S


def position_shift(grids: Sequence[Grid]) -> int:
    """How far the text behind pictures lies from where it would, had every visual token a position of its own."""
    return sum(max(rows, columns) - rows * columns for rows, columns in grids)


@lru_cache(maxsize=4096)
def _axes(grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of each token of a picture, row by row."""
    down, across = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    return down.flatten(), across.flatten()


def pair_positions(positions_3S: torch.Tensor, sections: Sequence[int], interleaved: bool) -> torch.Tensor:
    """(S, F): the position that each rotation pair follows.

    `sections` are the pairs of time, row and column: one run after another (Qwen2-VL), or with `interleaved` taking turns until rows
    and columns have theirs, what is left being time (Qwen3-VL).
    """
    time, rows, columns = sections
    if interleaved:
        axes = [0] * sum(sections)
        axes[1 : 3 * rows : 3], axes[2 : 3 * columns : 3] = [1] * rows, [2] * columns
    else:
        axes = [0] * time + [1] * rows + [2] * columns
    return positions_3S[on_device(axes, positions_3S.device)].T
