"""Native resolution: the picture's own size in whole patches (Qwen2-VL, NaViT)."""

from __future__ import annotations

import math

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


class Native(Resizing):
    """Qwen2-VL's smart_resize (Hugging Face, image_processing_qwen2_vl.py), and below it whatever a cap asks for.

    smart_resize may exceed its own cap where a picture is long and thin, or where min and cap are close: here the cap holds, by its
    own rule for large pictures, then by shortening the longer side.
    """

    native = True

    def __init__(self, image: ImageConfig, model: ModelConfig) -> None:
        self.patch, self.shuffle = model.vision.patch_size_px, model.projector.pixel_shuffle
        if model.vision.class_token and model.vision.keep_class_token:
            raise ResizingError("data.image.policy=native has one feature a patch: set model.vision.keep_class_token=false")
        self.min_tokens = image.min_tokens_per_image

    def grid(self, width: int, height: int, max_tokens: int | None = None) -> PictureGrid:
        check_size(width, height)
        check_cap(max_tokens, self.min_tokens, width, height, "native")
        if max(width, height) / min(width, height) > MAX_ASPECT_RATIO:
            raise ResizingError(
                f"a picture of {width}x{height} pixels is more than {MAX_ASPECT_RATIO} times as long as wide, which "
                "data.image.policy=native refuses, as Qwen2-VL does: leave it out or cut it"
            )
        rows, cols = self._lines(width, height, DEFAULT_MAX_TOKENS if max_tokens is None else max_tokens)
        patches = rows * cols * self.shuffle**2
        return PictureGrid(cols * self.shuffle, rows * self.shuffle, False, rows * cols, VisionWork.of([patches]))

    def least(self, width: int, height: int) -> int:
        return self.min_tokens

    def _lines(self, width: int, height: int, cap: int) -> tuple[int, int]:
        """Rows and columns of visual tokens, at least one each, at most `cap` together."""
        factor = self.patch * self.shuffle
        rows, cols = round(height / factor), round(width / factor)
        if rows * cols < self.min_tokens:
            beta = math.sqrt(self.min_tokens * factor**2 / (height * width))
            rows, cols = math.ceil(height * beta / factor), math.ceil(width * beta / factor)
        if rows * cols > cap:
            beta = math.sqrt((height * width) / (cap * factor**2))
            rows, cols = max(1, math.floor(height / beta / factor)), max(1, math.floor(width / beta / factor))
            rows, cols = (min(rows, cap // cols), cols) if rows > cols else (rows, min(cols, cap // rows))
        return rows, cols

    def cut(self, picture_HWC: np.ndarray, grid: PictureGrid) -> torch.Tensor:
        return resize(as_CHW(picture_HWC), grid.rows * self.patch, grid.cols * self.patch).reshape(-1)

    def grey(self, grid: PictureGrid) -> torch.Tensor:
        return torch.full((3 * grid.rows * grid.cols * self.patch**2,), GREY, dtype=torch.uint8)
