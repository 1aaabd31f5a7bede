"""Idefics3's splitting: the picture scaled to a given longest side, stretched to whole tiles and cut; the whole picture is the last tile.

The formulas are those of Hugging Face's image_processing_pil_idefics3.py (transformers 5.23; smolvlm has the same), with all their
rounding and its two resizes one after the other.

Shape legend: T tiles, C channels, H height, W width.
"""

from __future__ import annotations

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.pixels import as_CHW, resize, split_tiles
from megavlm.data.resizing_base import PictureGrid, SquareTiles, check_cap, check_size
from megavlm.planner.flops import VisionWork

MOST_PX = 4096
"""The processor never scales a side beyond this."""


class Split(SquareTiles):
    """Under a cap the longest side is lowered by a tile at a time, down to one tile alone.

    `PictureGrid.thumbnail` says that the whole picture comes after the grid; a picture of one tile has none.
    """

    def __init__(self, image: ImageConfig, model: ModelConfig) -> None:
        super().__init__(image, model)
        assert image.longest_edge_px is not None, "the config sees to it"
        self.longest = image.longest_edge_px

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        check_size(width, height)
        check_cap(max_tokens, self.tokens_per_tile, width, height, "split")
        cols, rows = self._tiles(width, height, self.longest)
        longest = max(cols, rows) * self.side
        while max_tokens is not None and _num_tiles(cols, rows) * self.tokens_per_tile > max_tokens:
            longest -= self.side
            cols, rows = self._tiles(width, height, longest)
        tiles = _num_tiles(cols, rows)
        return PictureGrid(cols, rows, tiles > 1, tiles * self.tokens_per_tile, VisionWork.uniform(tiles, self.patches))

    def least(self, width: int, height: int) -> int:
        return self.tokens_per_tile

    def _tiles(self, width: int, height: int, longest: int) -> tuple[int, int]:
        """Columns and rows of tiles."""
        width, height = _scaled(width, height, longest)
        ratio = width / height
        if width >= height:
            cols = -(-width // self.side)
            return cols, max(1, -(-int(cols * self.side / ratio) // self.side))
        rows = -(-height // self.side)
        return max(1, -(-int(rows * self.side * ratio) // self.side)), rows

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        picture, height, width = as_CHW(picture_HWC), picture_HWC.shape[0], picture_HWC.shape[1]
        interpolation = self.image.interpolation
        if (grid.cols, grid.rows) == self._tiles(width, height, self.longest):  # no cap has lowered it
            wide, tall = _scaled(width, height, self.longest)
            picture = resize(picture, tall, wide, interpolation)
        picture = resize(picture, grid.rows * self.side, grid.cols * self.side, interpolation)
        tiles = split_tiles(picture, self.side)
        if grid.thumbnail:
            tiles = torch.cat([tiles, resize(picture, self.side, self.side, interpolation).unsqueeze(0)])
        return tiles.contiguous()


def _num_tiles(cols: int, rows: int) -> int:
    return cols * rows + int(cols * rows > 1)


def _scaled(width: int, height: int, longest: int) -> tuple[int, int]:
    """Width and height when the longest side is `longest`; the other is even."""
    ratio = width / height
    if width >= height:
        width, height = longest, int(longest / ratio)
        height += height % 2
    else:
        width, height = int(longest * ratio), longest
        width += width % 2
    width, height = max(width, 1), max(height, 1)
    ratio = width / height
    if width >= height and width > MOST_PX:
        width, height = MOST_PX, int(MOST_PX / ratio)
    elif height > width and height > MOST_PX:
        width, height = int(MOST_PX * ratio), MOST_PX
    return max(width, 1), max(height, 1)
