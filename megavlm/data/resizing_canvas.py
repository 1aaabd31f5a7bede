"""Llama 3.2 Vision's canvas: the grid of tiles on which the picture is largest, the picture in its upper left corner, black around it.

The sizes of transformers 5.23, models/mllama, `MllamaImageProcessor`.

Shape legend: T tiles, C channels, H height, W width.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.pixels import as_CHW, resize, split_tiles
from megavlm.data.resizing_base import PictureGrid, ResizingError, SquareTiles, check_cap, check_size
from megavlm.planner.flops import VisionWork


class Canvas(SquareTiles):
    """Grids of at most model.vision.canvas.max_tiles tiles; under a cap the picture gets fewer."""

    def __init__(self, image: ImageConfig, model: ModelConfig) -> None:
        super().__init__(image, model)
        if model.vision.canvas is None:
            raise ResizingError("data.image.policy=canvas needs model.vision.canvas, an encoder that sees a picture's tiles together")
        self.grids, self.max_tiles = model.vision.canvas.grids, model.vision.canvas.max_tiles

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        check_size(width, height)
        check_cap(max_tokens, self.tokens_per_tile, width, height, "canvas")
        most = self.max_tiles if max_tokens is None else max_tokens // self.tokens_per_tile
        rows, cols = canvas_grid(width, height, self.side, tuple(grid for grid in self.grids if grid[0] * grid[1] <= most))
        # The encoder works on empty tiles too.
        work = VisionWork(rows * cols, self.max_tiles * self.patches, (self.max_tiles * self.patches) ** 2)
        return PictureGrid(cols, rows, False, rows * cols * self.tokens_per_tile, work)

    def least(self, width: int, height: int) -> int:
        return self.tokens_per_tile

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        height, width = picture_HWC.shape[:2]
        canvas = torch.zeros(3, grid.rows * self.side, grid.cols * self.side, dtype=torch.uint8)
        rows, columns = fitted(width, height, canvas.shape[2], canvas.shape[1], self.side)
        canvas[:, :rows, :columns] = resize(as_CHW(picture_HWC), rows, columns, self.image.interpolation)
        return split_tiles(canvas, self.side).contiguous()


@lru_cache(maxsize=65536)
def canvas_grid(width: int, height: int, tile_px: int, grids: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """(rows, columns): the least enlargement that fills a side of the canvas, else the least reduction; of equal ones the fewest tiles."""
    scales = [min(rows * tile_px / height, columns * tile_px / width) for rows, columns in grids]
    enlarging = [scale for scale in scales if scale >= 1]
    chosen = min(enlarging) if enlarging else max(scales)
    return min((grid for grid, scale in zip(grids, scales, strict=True) if scale == chosen), key=lambda grid: grid[0] * grid[1])


def fitted(width: int, height: int, canvas_width: int, canvas_height: int, tile_px: int) -> tuple[int, int]:
    """(height, width) of the picture on its canvas: never enlarged beyond a tile's side."""
    target_width = min(max(width, tile_px), canvas_width)
    target_height = min(max(height, tile_px), canvas_height)
    scale_height, scale_width = target_height / height, target_width / width
    if scale_width < scale_height:
        return min(math.floor(height * scale_width) or 1, target_height), target_width
    return target_height, min(math.floor(width * scale_height) or 1, target_width)
