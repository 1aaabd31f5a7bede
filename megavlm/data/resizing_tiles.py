"""Square tiles: one a picture (CLIP, SigLIP, LLaVA), or a grid of the nearest aspect ratio and a thumbnail (InternVL).

Shape legend: T tiles, C channels, H height, W width.
"""

from __future__ import annotations

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.pixels import TileGrid, as_CHW, crop_to_square, cut_tiles, pad_to_square, resize, tile_grid
from megavlm.data.resizing_base import PictureGrid, SquareTiles, check_cap, check_size
from megavlm.planner.flops import VisionWork


class Fixed(SquareTiles):
    """One tile a picture, whatever its size."""

    def __init__(self, image: ImageConfig, model: ModelConfig) -> None:
        super().__init__(image, model)
        # LLaVA's expand2square and Hugging Face's LlavaImageProcessor cut the mean's fraction off, they do not round it.
        red, green, blue = model.vision.image_mean
        self.mean_colour = int(255 * red), int(255 * green), int(255 * blue)

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        check_size(width, height)
        check_cap(max_tokens, self.tokens_per_tile, width, height, "fixed")
        return PictureGrid(1, 1, False, self.tokens_per_tile, VisionWork.uniform(1, self.patches))

    def least(self, width: int, height: int) -> int:
        return self.tokens_per_tile

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        if self.image.fit == "crop":
            return crop_to_square(picture_HWC, self.side, self.image.interpolation).unsqueeze(0)
        if self.image.fit == "pad":
            return pad_to_square(picture_HWC, self.side, self.mean_colour, self.image.interpolation).unsqueeze(0)
        return resize(as_CHW(picture_HWC), self.side, self.side, self.image.interpolation).unsqueeze(0).contiguous()


class Tiles(SquareTiles):
    """InternVL's dynamic tiling. Under a cap the picture gets fewer tiles, down to one; the cap goes before min_tiles."""

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        check_size(width, height)
        check_cap(max_tokens, self.tokens_per_tile, width, height, "tiles")
        found = tile_grid(width, height, self.image, self.side)
        if max_tokens is not None:
            allowed = max_tokens // self.tokens_per_tile
            most = min(self.image.max_tiles, allowed)
            while found.num_tiles > allowed:
                found = tile_grid(width, height, self.image, self.side, most)
                most -= 1
        return PictureGrid(
            found.cols,
            found.rows,
            found.thumbnail,
            found.num_tiles * self.tokens_per_tile,
            VisionWork.uniform(found.num_tiles, self.patches),
        )

    def least(self, width: int, height: int) -> int:
        return self.tokens_per_tile

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        return cut_tiles(picture_HWC, TileGrid(grid.cols, grid.rows, grid.thumbnail), self.side, self.image.interpolation)
