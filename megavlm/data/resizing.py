"""Resizing policies: how one picture becomes tiles or patches, and how many visual tokens that is, from its size alone.

A policy has two halves that must agree: `grid` plans from width and height, `cut` makes the pixels of that plan. The index stores
each picture's grid, so that whatever lowered a resolution is decided once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.images import GREY, TileGrid, cut_tiles, tile_grid
from megavlm.planner.flops import VisionWork


class PictureGrid(NamedTuple):
    """The plan of one picture."""

    cols: int
    """Tiles across; native resolution: patches across."""
    rows: int
    thumbnail: bool
    """The whole picture is one more tile."""
    tokens: int
    """Visual tokens that the LLM gets."""
    work: VisionWork


class Resizing(ABC):
    """One policy of data.image.policy, bound to a model. Stateless and thread-safe."""

    native = False
    """Pixels are a flat run of one picture (PackedBatch.pixels_X), not square tiles."""

    @abstractmethod
    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        """Plan of a picture of width x height pixels, upright, with at most `max_tokens` visual tokens.

        Raises:
            ResizingError: no plan of this policy has so few tokens; names the least.
        """

    @abstractmethod
    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        """uint8 pixels of that plan: tiles (T, 3, side, side); native: (3 x height x width,)."""

    @abstractmethod
    def grey(self, grid: PictureGrid) -> torch.Tensor:
        """Stand-in of the same shape for a picture that could not be read."""

    def feature_rows(self, grid: PictureGrid, width: int, height: int) -> np.ndarray | None:
        """int64 (tokens,): row of the picture's projected features that each visual token takes, -1 for the learned end of a row.

        None: all rows in order.
        """
        return None


class ResizingError(ValueError):
    """A picture that cannot be planned within its cap."""


class FixedOrTiled(Resizing):
    """One square tile a picture, or InternVL's grid of tiles."""

    def __init__(self, image: ImageConfig, model: ModelConfig) -> None:
        self.image, self.side = image, model.vision.image_size_px
        self.tokens_per_tile, self.patches = model.visual_tokens_per_tile, model.vision.num_patches

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        found = tile_grid(width, height, self.image, self.side)
        tokens = found.num_tiles * self.tokens_per_tile
        return PictureGrid(found.cols, found.rows, found.thumbnail, tokens, VisionWork.uniform(found.num_tiles, self.patches))

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        return cut_tiles(picture_HWC, TileGrid(grid.cols, grid.rows, grid.thumbnail), self.side)

    def grey(self, grid: PictureGrid) -> torch.Tensor:
        return torch.full((grid.work.tiles, 3, self.side, self.side), GREY, dtype=torch.uint8)


def make_resizing(image: ImageConfig, model: ModelConfig) -> Resizing:
    """The policy that the recipe asks for."""
    return FixedOrTiled(image, model)


def plan_pictures(sizes: list[tuple[int, int]], resizing: Resizing, image: ImageConfig, max_tokens: int | None = None) -> list[PictureGrid]:
    """Plans of one sample's pictures (width, height) under data.image.max_tokens_per_image and max_tokens_per_sample.

    `max_tokens`: a lower cap on their sum, for a sample that is too long for a pack.

    Raises:
        ResizingError: no plan fits.
    """
    return [resizing.grid(width, height, image.max_tokens_per_image) for width, height in sizes]
