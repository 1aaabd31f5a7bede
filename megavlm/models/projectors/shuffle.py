"""Merging neighbouring patches into one visual token (pixel shuffle, patch merger).

Shape legend: T tiles, D feature width.
"""

from __future__ import annotations

import torch

from megavlm.models.vision.features import Features
from megavlm.models.vision.pictures import Grid


def pixel_shuffle(x_TFD: torch.Tensor, factor: int, grid: Grid | None = None, *, channels_first: bool = False) -> torch.Tensor:
    """Merge factor x factor neighbours into the channel dimension: (T, rows x columns, D) -> (T, rows x columns / factor^2, D x factor^2).

    Values are ordered row within the block, column within the block, channel; with `channels_first` channel, row, column. `grid` is
    (rows, columns); None: a square.

    Raises ValueError when the blocks do not tile the grid.
    """
    tiles, features, width = x_TFD.shape
    rows, columns = grid or (int(features**0.5),) * 2
    if rows % factor or columns % factor:
        raise ValueError(
            f"a picture of {rows} x {columns} patches does not divide into model.projector.pixel_shuffle={factor} squared blocks"
        )
    x = x_TFD.reshape(tiles, rows // factor, factor, columns // factor, factor, width)
    order = (0, 1, 3, 5, 2, 4) if channels_first else (0, 1, 3, 2, 4, 5)
    return x.permute(order).reshape(tiles, features // factor**2, factor * factor * width)


def shuffled(features: Features, factor: int, *, channels_first: bool = False) -> torch.Tensor:
    """All pictures' features with factor x factor neighbours merged, (rows, D x factor^2)."""
    x_ND = features.x_ND
    if factor == 1:
        return x_ND
    if (grid := features.equal_grid) is not None:
        return pixel_shuffle(x_ND.view(len(features.grids), grid[0] * grid[1], -1), factor, grid, channels_first=channels_first).flatten(
            0, 1
        )
    pictures = zip(x_ND.split(features.lengths), features.grids, strict=True)
    return torch.cat([pixel_shuffle(x.unsqueeze(0), factor, grid, channels_first=channels_first)[0] for x, grid in pictures])
