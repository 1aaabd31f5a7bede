"""LLaVA-NeXT's anyres: the grid of tiles that keeps most of the picture, padded in black; the whole picture is the first tile.

The formulas are those of Hugging Face's image_processing_utils (select_best_resolution, get_patch_output_size) and of LlavaNextModel
(unpad_image, pack_image_features), to the letter, with all their rounding: features that saw nothing but padding are left out.

Shape legend: T tiles, C channels, H height, W width, N visual tokens.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.blends import shrunk, single
from megavlm.data.pixels import as_CHW, pad_to_square, resize, split_tiles
from megavlm.data.resizing_base import PictureGrid, ResizingError, SquareTiles, check_cap, check_size
from megavlm.planner.flops import VisionWork

SHRINK_FROM = 1.1
"""LLaVA-OneVision shrinks what is longer by more than this on average (transformers 5.23, models/llava_onevision)."""


class AnyRes(SquareTiles):
    """Under a cap the picture gets a smaller grid of data.image.anyres_grids; if none is small enough, the whole picture alone.

    `PictureGrid.thumbnail` says that the whole picture comes first and the grid after it; without, there is no grid.
    """

    def __init__(self, image: ImageConfig, model: ModelConfig) -> None:
        super().__init__(image, model)
        if model.vision.class_token and model.vision.keep_class_token:
            raise ResizingError("data.image.policy=anyres lays features out as a picture: set model.vision.keep_class_token=false")
        self.features = self.side // model.vision.patch_size_px // model.projector.pixel_shuffle
        self.newline = int(model.projector.image_newline)
        self.grids = [(rows, cols) for rows, cols in image.anyres_grids]
        # LLaVA-OneVision's own colour of the padding: the mean with its fraction cut off.
        red, green, blue = model.vision.image_mean
        self.mean_colour = int(255 * red), int(255 * green), int(255 * blue)

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        check_size(width, height)
        check_cap(max_tokens, self.least(width, height), width, height, "anyres")
        fitting = [g for g in self.grids if max_tokens is None or self._tokens(g, width, height) <= max_tokens]
        if not fitting:
            return PictureGrid(1, 1, False, self.tokens_per_tile + self.newline, VisionWork.uniform(1, self.patches))
        rows, cols = self._best(fitting, width, height)
        work = VisionWork.uniform(rows * cols + 1, self.patches)
        return PictureGrid(cols, rows, True, self._tokens((rows, cols), width, height), work)

    def least(self, width: int, height: int) -> int:
        # A picture far from every grid's shape may be all padding in it: then the grid adds less than the alone picture's newline.
        return min([self.tokens_per_tile + self.newline, *(self._tokens(g, width, height) for g in self.grids)])

    def for_several(self) -> AnyRes:
        if self.image.anyres_several == "alike":
            return self
        without_grids = copy.copy(self)
        without_grids.grids = []
        return without_grids

    def _best(self, grids: list[tuple[int, int]], width: int, height: int) -> tuple[int, int]:
        """The grid that keeps most of the picture's pixels, among equals the one with least left over, among equals the first."""

        def kept_and_wasted(grid: tuple[int, int]) -> tuple[int, int]:
            down, across = grid[0] * self.side, grid[1] * self.side
            scale = min(across / width, down / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - down * across

        return max(grids, key=kept_and_wasted)  # max keeps the first of equals

    def _unpadded(self, grid: tuple[int, int], width: int, height: int) -> tuple[int, int, int, int]:
        """Lines and columns of features on the grid, and how many of each are padding, at either end."""
        lines, columns = grid[0] * self.features, grid[1] * self.features
        if width / height > columns / lines:
            return lines, columns, (lines - int(round(height * (columns / width), 7))) // 2, 0
        return lines, columns, 0, (columns - int(round(width * (lines / height), 7))) // 2

    def _shape(self, grid: tuple[int, int], width: int, height: int) -> tuple[int, int]:
        """Lines and columns of visual tokens of a grid: what is no padding, shrunk where it is more than anyres_max_tiles allow."""
        lines, columns, above, left = self._unpadded(grid, width, height)
        lines, columns, most = lines - 2 * above, columns - 2 * left, self.image.anyres_max_tiles
        ratio = 0.0 if most is None else math.sqrt(lines * columns / (most * self.features**2))
        return (int(lines // ratio), int(columns // ratio)) if ratio > SHRINK_FROM else (lines, columns)

    def _tokens(self, grid: tuple[int, int], width: int, height: int) -> int:
        lines, columns = self._shape(grid, width, height)
        return self.tokens_per_tile + lines * (columns + self.newline)

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        picture = as_CHW(picture_HWC)
        if not grid.thumbnail and self.image.anyres_several == "whole":
            return pad_to_square(picture_HWC, self.side, self.mean_colour, self.image.interpolation).unsqueeze(0)
        whole = resize(picture, self.side, self.side, self.image.interpolation).unsqueeze(0)
        if not grid.thumbnail:
            return whole.contiguous()
        height, width = picture_HWC.shape[:2]
        down, across = grid.rows * self.side, grid.cols * self.side
        if across / width < down / height:
            new_width, new_height = across, min(math.ceil(height * (across / width)), down)
        else:
            new_width, new_height = min(math.ceil(width * (down / height)), across), down
        canvas = torch.zeros((3, down, across), dtype=torch.uint8)
        top, left = (down - new_height) // 2, (across - new_width) // 2
        canvas[:, top : top + new_height, left : left + new_width] = resize(picture, new_height, new_width, self.image.interpolation)
        return torch.cat([whole, split_tiles(canvas, self.side)]).contiguous()

    def feature_rows(self, grid: PictureGrid, width: int, height: int) -> np.ndarray | None:
        base, alike = np.arange(self.tokens_per_tile, dtype=np.int64), self.image.anyres_max_tiles is None
        if not grid.thumbnail:
            rows = np.append(base, [-1] * self.newline).astype(np.int64)
            return rows if alike else single(rows)
        n, per_tile = self.features, self.tokens_per_tile
        of_tiles = per_tile + np.arange(grid.rows * grid.cols * per_tile, dtype=np.int64).reshape(grid.rows, grid.cols, n, n)
        picture = of_tiles.transpose(0, 2, 1, 3).reshape(grid.rows * n, grid.cols * n)
        lines, columns, above, left = self._unpadded((grid.rows, grid.cols), width, height)
        picture = picture[above : lines - above, left : columns - left]
        shape = self._shape((grid.rows, grid.cols), width, height)
        ends = np.full((shape[0], self.newline), -1, dtype=np.int64)
        if alike:
            return np.concatenate([base, np.concatenate([picture, ends], axis=1).ravel()])
        mixed = single(picture) if shape == picture.shape else shrunk(picture, *shape)
        return np.concatenate([single(base), np.concatenate([mixed, single(ends)], axis=1).reshape(-1, 4)])
