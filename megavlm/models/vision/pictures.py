"""Pictures of unequal sizes out of one run of pixels, for encoders that take them in their own size.

Shape legend: X pixels of all pictures, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

Grid = tuple[int, int]
"""(rows, columns) of patches."""


def check_pixels(pixels_X: torch.Tensor, grids: Sequence[Grid], channels: int, patch_px: int) -> list[int]:
    """Pixel values of each picture in a flat run.

    Raises ValueError when the run is not exactly as long as the grids say.
    """
    sizes = [channels * rows * columns * patch_px**2 for rows, columns in grids]
    if sum(sizes) != pixels_X.numel():
        raise ValueError(
            f"{pixels_X.numel()} pixel values, but {len(grids)} pictures of {sum(r * c for r, c in grids)} patches of {patch_px} px have "
            f"{sum(sizes)}: the data were prepared for another model.vision"
        )
    return sizes


def split_pictures(pixels_X: torch.Tensor, grids: Sequence[Grid], channels: int, patch_px: int) -> list[torch.Tensor]:
    """Pictures (C, height, width) out of a flat run.

    Raises ValueError when the run is not exactly as long as the grids say.
    """
    sizes = check_pixels(pixels_X, grids, channels, patch_px)
    shapes = [(channels, rows * patch_px, columns * patch_px) for rows, columns in grids]
    return [run.view(shape) for run, shape in zip(pixels_X.split(sizes), shapes, strict=True)]
