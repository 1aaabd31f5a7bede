"""Llama 3.2 Vision's canvas against its image processor: grids, pixels, and what the model is fed."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.prompt import Prompt
from megavlm.data.resizing import ResizingError, make_resizing
from megavlm.data.types import PictureTiles
from megavlm.testing.families.mllama import CASES

SIZES = [(16, 16), (1, 1), (33, 7), (7, 33), (64, 20), (5, 90), (100, 100), (16, 64), (17, 31), (300, 2)]


def model_of(tiles: int = 4) -> ModelConfig:
    tf = quiet_transformers()
    config = CASES[0 if tiles == 4 else 1].config(tf)
    return family("mllama").model_from_hf(config, Problems())


def processor(model: ModelConfig, **more: int):
    vision = model.vision
    side = {"height": vision.image_size_px, "width": vision.image_size_px}
    assert vision.canvas is not None
    return quiet_transformers().MllamaImageProcessor(
        size=side, max_image_tiles=vision.canvas.max_tiles, image_mean=list(vision.image_mean), image_std=list(vision.image_std), **more
    )


@pytest.mark.parametrize(("tiles", "resample"), [(4, {}), (2, {}), (4, {"resample": 3})])
def test_pictures_are_those_of_the_processor(tiles: int, resample: dict[str, int]) -> None:
    """Within two of 256 levels, and every input that comes with them."""
    model, rng = model_of(tiles), random.Random(0)
    image = ImageConfig(policy="canvas", interpolation="bicubic") if resample else ImageConfig(policy="canvas")
    resizing, theirs = make_resizing(image, model), processor(model, **resample)
    for width, height in [*SIZES, *((rng.randint(1, 120), rng.randint(1, 120)) for _ in range(40))]:
        picture = np.random.default_rng(width * 1000 + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
        grid = resizing.grid(width, height)
        assert grid.tokens == 1
        cut = resizing.cut(picture, grid)
        assert resizing.grey(grid).shape == cut.shape == (grid.work.tiles, 3, 16, 16)
        token = model.language.vocab_size
        ours = family("mllama").hf_inputs(
            model, Prompt([token, 5], cut, picture_tiles=[PictureTiles(grid.work.tiles, grid.rows, grid.cols)])
        )
        found = theirs(torch.from_numpy(picture).permute(2, 0, 1), return_tensors="pt")
        levels = (ours["pixel_values"] - found["pixel_values"]) * torch.tensor(model.vision.image_std).view(3, 1, 1) * 255
        assert float(levels.abs().max()) <= 2.01, (width, height)
        assert torch.equal(ours["aspect_ratio_ids"], found["aspect_ratio_ids"])
        assert torch.equal(ours["aspect_ratio_mask"], found["aspect_ratio_mask"])


def test_needs_an_encoder_with_a_canvas() -> None:
    with pytest.raises(ResizingError, match="canvas needs model"):
        make_resizing(ImageConfig(policy="canvas"), ModelConfig())
