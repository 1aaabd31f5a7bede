"""Which rows of the projected features the visual tokens of several pictures take.

Shape legend: N visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megavlm.data.resizing import PictureGrid, Resizing


def feature_rows(
    sizes: Sequence[tuple[int, int]], grids: Sequence[PictureGrid], resizing: Resizing, tokens_per_tile: int
) -> torch.Tensor | None:
    """int64 (N): rows of all pictures' projected features, -1 being the end of a row; None: all in order."""
    rows = [resizing.feature_rows(grid, width, height) for grid, (width, height) in zip(grids, sizes, strict=True)]
    if all(own is None for own in rows):
        return None
    found, start = [], 0
    for own, grid in zip(rows, grids, strict=True):
        made = grid.work.tiles * tokens_per_tile
        own = np.arange(made) if own is None else own
        found.append(np.where(own < 0, own, own + start))
        start += made
    return torch.from_numpy(np.concatenate(found)).to(torch.int64)
