"""Native resolution: the picture's own size in whole patches (Qwen2-VL, Pixtral, Idefics2, NaViT)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.pixels import GREY, as_CHW, resize
from megavlm.data.resizing_base import PictureGrid, Resizing, ResizingError, check_cap, check_size
from megavlm.planner.flops import VisionWork

DEFAULT_MAX_TOKENS = 16384
"""Qwen2-VL's cap on the visual tokens of one picture."""
MAX_ASPECT_RATIO = 200
"""Qwen2-VL's smart_resize refuses longer pictures."""

_WHOLE: dict[str, Callable[[float], int]] = {"nearest": round, "stretch": math.ceil, "cut": lambda patches: max(1, math.floor(patches))}
"""data.image.whole_patches -> a side's number of patches."""


class Native(Resizing):
    """Qwen2-VL's smart_resize (Hugging Face, image_processing_qwen2_vl.py), and below it whatever a cap asks for; with
    data.image.longest_edge_px and whole_patches the rules of Pixtral (`get_resize_output_image_size`, models/pixtral) and Idefics2.

    smart_resize may exceed its own cap where a picture is long and thin, or where min and cap are close: here the cap holds, by its
    own rule for large pictures, then by shortening the longer side.
    """

    native = True

    def __init__(self, image: ImageConfig, model: ModelConfig) -> None:
        self.image, self.patch, self.shuffle = image, model.vision.patch_size_px, model.projector.pixel_shuffle
        if model.vision.class_token and model.vision.keep_class_token:
            raise ResizingError("data.image.policy=native has one feature a patch: set model.vision.keep_class_token=false")
        self.fixed_tokens = model.projector.tokens_per_picture
        self.min_tokens = image.min_tokens_per_image
        # Rows and columns beyond the table have no position.
        self.most_lines = model.vision.grid_side // self.shuffle if model.vision.positions == "factorised" else None

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        check_size(width, height)
        check_cap(max_tokens, self.least(width, height), width, height, "native")
        if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
            raise ResizingError(
                f"a picture of {width}x{height} pixels is more than {MAX_ASPECT_RATIO} times as long as wide, which "
                "data.image.policy=native refuses, as Qwen2-VL does: leave it out or cut it"
            )
        cap = DEFAULT_MAX_TOKENS if max_tokens is None or self.fixed_tokens is not None else max_tokens
        rows, cols = self._lines(*self._edges(width, height), cap)
        if self.most_lines is not None and max(rows, cols) > self.most_lines:
            longest = max(rows, cols)
            rows, cols = (max(1, n * self.most_lines // longest) for n in (rows, cols))
        patches = rows * cols * self.shuffle**2
        return PictureGrid(cols * self.shuffle, rows * self.shuffle, False, self.fixed_tokens or rows * cols, VisionWork.of([patches]))

    def least(self, width: int, height: int) -> int:
        return self.fixed_tokens or self.min_tokens

    def _edges(self, width: int, height: int) -> tuple[int, int]:
        """Width and height under longest_edge_px and shortest_edge_px."""
        longest, shortest = self.image.longest_edge_px, self.image.shortest_edge_px or 1
        if longest is not None and max(width, height) > longest:
            if self.image.whole_patches == "cut":  # to the letter: the two divide in another order
                ratio = width / height
                width, height = (longest, int(longest / ratio)) if width >= height else (int(longest * ratio), longest)
            else:
                ratio = max(width, height) / longest
                width, height = math.floor(width / ratio), math.floor(height / ratio)
        return max(width, shortest), max(height, shortest)

    def _lines(self, width: int, height: int, cap: int) -> tuple[int, int]:
        """Rows and columns of visual tokens (before a resampler), at least one each, at most `cap` together."""
        factor = self.patch * self.shuffle
        rows, cols = (_WHOLE[self.image.whole_patches](side / factor) for side in (height, width))
        if rows * cols < self.min_tokens:
            beta = math.sqrt(self.min_tokens * factor**2 / (height * width))
            rows, cols = math.ceil(height * beta / factor), math.ceil(width * beta / factor)
        if rows * cols > cap:
            beta = math.sqrt((height * width) / (cap * factor**2))
            rows, cols = max(1, math.floor(height / beta / factor)), max(1, math.floor(width / beta / factor))
            rows, cols = (min(rows, cap // cols), cols) if rows > cols else (rows, min(cols, cap // rows))
        return rows, cols

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        height, width = grid.rows * self.patch, grid.cols * self.patch
        if self.image.whole_patches == "cut":
            wide, tall = self._edges(picture_HWC.shape[1], picture_HWC.shape[0])
            if (tall // self.patch, wide // self.patch) == (grid.rows, grid.cols):  # no cap has lowered it
                return resize(as_CHW(picture_HWC), tall, wide, self.image.interpolation)[:, :height, :width].reshape(-1)
        return resize(as_CHW(picture_HWC), height, width, self.image.interpolation).reshape(-1)

    def grey(self, grid: PictureGrid) -> torch.Tensor:
        return torch.full((3 * grid.rows * grid.cols * self.patch**2,), GREY, dtype=torch.uint8)
