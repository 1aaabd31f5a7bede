"""What every resizing policy has in common: the plan of a picture, and the interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.pixels import GREY
from megavlm.planner.flops import VisionWork


class ResizingError(ValueError):
    """A picture that cannot be planned: its caps are too low, or its shape is one that the policy refuses."""


class PictureGrid(NamedTuple):
    """The plan of one picture."""

    cols: int
    """Tiles across; native resolution: patches across."""
    rows: int
    thumbnail: bool
    """The whole picture is one more tile."""
    tokens: int
    """Visual tokens that the LLM gets, and with data.image.marks the tokens between them."""
    work: VisionWork


class Resizing(ABC):
    """One policy of data.image.policy, bound to a model. Stateless and thread-safe."""

    native = False
    """Pixels are a flat run of one picture (PackedBatch.pixels_X), not square tiles."""

    @abstractmethod
    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        """Plan of a picture of width x height pixels, upright, with at most `max_tokens` visual tokens.

        With a higher `max_tokens` there are never fewer tokens.

        Raises:
            ResizingError: no plan of this policy has so few tokens (the least is named), or it refuses the picture's shape.
        """

    @abstractmethod
    def least(self, width: int, height: int) -> int:
        """The smallest `max_tokens` that `grid` accepts for a picture of that size."""

    def for_several(self) -> Resizing:
        """The policy of pictures in a sample with more than one."""
        return self

    @abstractmethod
    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        """uint8 pixels of that plan: tiles (T, 3, side, side); native: (3 x height x width,)."""

    @abstractmethod
    def grey(self, grid: PictureGrid) -> torch.Tensor:
        """Stand-in of the same shape for a picture that could not be read."""

    def sequence(self, grid: PictureGrid) -> int | np.ndarray:
        """What stands in the text for the picture: so many placeholders, or int64 ids with other tokens between them."""
        return grid.tokens

    def feature_rows(self, grid: PictureGrid, width: int, height: int) -> np.ndarray | None:
        """int64 (tokens,): row of the picture's projected features that each visual token takes, -1 for the learned end of a row; or
        (tokens, 4) as `blends` writes them.

        None: all rows in order.
        """
        return None


class SquareTiles(Resizing):
    """A policy whose pixels are square tiles of the encoder's size."""

    def __init__(self, image: ImageConfig, model: ModelConfig) -> None:
        self.image, self.side = image, model.vision.image_size_px
        self.tokens_per_tile, self.patches = model.visual_tokens_per_tile, model.vision.num_patches

    def grey(self, grid: PictureGrid) -> torch.Tensor:
        return torch.full((grid.work.tiles, 3, self.side, self.side), GREY, dtype=torch.uint8)


def check_size(width: int, height: int) -> None:
    """Raises ResizingError for a picture without pixels."""
    if width < 1 or height < 1:
        raise ResizingError(f"a picture of {width}x{height} pixels has no pixels: correct its width and height in the sample's metadata")


def check_cap(max_tokens: int | None, least: int, width: int, height: int, policy: str) -> None:
    """Raises ResizingError when a cap is below what the policy needs at least."""
    if max_tokens is not None and max_tokens < least:
        raise ResizingError(
            f"a picture of {width}x{height} pixels may have {max_tokens} visual tokens, and data.image.policy={policy} needs at least "
            f"{least}: raise data.image.max_tokens_per_image, max_tokens_per_sample or data.seq_len_tokens, or use fewer pictures"
        )
