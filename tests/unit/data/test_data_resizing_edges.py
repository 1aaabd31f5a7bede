"""Pictures by their longest side: Idefics3's splitting, Pixtral's and Idefics2's own sizes, against Hugging Face's processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.resizing import ResizingError, make_resizing, plan_pictures
from tests.unit.data.test_data_resizing import RAW, assert_close, lines_first, noise  # noqa: F401

SIZES = [(640, 480), (480, 640), (333, 1000), (127, 128), (128, 128), (32, 32), (31, 700), (700, 31), (400, 100), (97, 33), (20, 25)]
BICUBIC = Image.Resampling.BICUBIC


def model(side=32, patch=4, **projector):
    vision = {"image_size_px": side, "patch_size_px": patch, "class_token": False}
    return ModelConfig.model_validate({"vision": vision, "projector": projector})


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_split_tiles_are_idefics3s(size):
    from transformers import Idefics3ImageProcessorPil

    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 32}, resample=BICUBIC, return_row_col_info=True, **RAW
    )
    pixels = noise(*size)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")
    resizing = make_resizing(ImageConfig(policy="split", longest_edge_px=128), model(pixel_shuffle=2))
    grid = resizing.grid(*size)
    rows, cols = (theirs[name][0][0] for name in ("rows", "cols"))
    assert (grid.rows, grid.cols, grid.thumbnail) == ((rows, cols, True) if rows else (1, 1, False))
    assert grid.tokens == 16 * len(theirs["pixel_values"][0]) and grid.work.tiles == len(theirs["pixel_values"][0])
    ours = resizing.cut(pixels, grid)
    assert ours.shape == resizing.grey(grid).shape and ours.dtype == torch.uint8
    assert_close(ours.numpy().astype(np.int64), theirs["pixel_values"][0], f"split {size}")


@pytest.mark.parametrize("longest", [64, 100, 364, 1456, 5000])
def test_split_grids_are_idefics3s_for_any_size(longest):
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil, get_resize_output_image_size

    processor = Idefics3ImageProcessorPil()
    found = []
    processor.resize = lambda image, size, resample=None: found.append((size.height, size.width))
    side = 364
    resizing = make_resizing(ImageConfig(policy="split", longest_edge_px=longest), model(side=side, patch=14))
    rng = np.random.default_rng(3)
    for width, height in np.exp(rng.uniform(1, 8.5, (300, 2))).astype(int).tolist():
        scaled = get_resize_output_image_size(np.broadcast_to(np.zeros(1), (3, height, width)), longest)
        processor.resize_for_vision_encoder(np.broadcast_to(np.zeros(1), (3, *scaled)), side)
        down, across = found[-1]
        grid = resizing.grid(width, height)
        assert (grid.rows, grid.cols) == (down // side, across // side), (width, height)


def test_split_under_a_cap_has_fewer_tiles():
    resizing = make_resizing(ImageConfig(policy="split", longest_edge_px=128), model(pixel_shuffle=2))
    assert resizing.grid(400, 300).tokens == (4 * 3 + 1) * 16
    before = 0
    for cap in range(16, 16 * 14):
        tokens = resizing.grid(400, 300, cap).tokens
        assert before <= tokens <= cap
        before = tokens
    assert resizing.grid(400, 300, 16).thumbnail is False
    with pytest.raises(ResizingError, match="policy=split needs at least 16"):
        resizing.grid(400, 300, 15)
    lowered = resizing.grid(400, 300, 100)
    assert resizing.cut(noise(400, 300), lowered).shape == (lowered.work.tiles, 3, 32, 32)


@pytest.mark.parametrize("shuffle", [1, 2])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_sizes_and_pixels_are_pixtrals(size, shuffle):
    from transformers import PixtralImageProcessorPil

    side = 4 * shuffle
    processor = PixtralImageProcessorPil(size={"longest_edge": 100}, patch_size={"height": side, "width": side}, do_pad=False, **RAW)
    pixels = noise(*size)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    image = ImageConfig(policy="native", whole_patches="stretch", longest_edge_px=100, min_tokens_per_image=1)
    resizing = make_resizing(image, model(pixel_shuffle=shuffle))
    grid = resizing.grid(*size)
    assert (grid.rows * 4, grid.cols * 4) == theirs.shape[1:] and grid.tokens * shuffle**2 == grid.rows * grid.cols
    assert_close(resizing.cut(pixels, grid).view(3, *theirs.shape[1:]).numpy().astype(np.int64), theirs, f"pixtral {size}")


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_native_pixels_are_those_that_idefics2_sees(size):
    """Its encoder leaves out patches that are not whole."""
    from transformers import Idefics2ImageProcessorPil

    processor = Idefics2ImageProcessorPil(size={"longest_edge": 98, "shortest_edge": 37}, resample=BICUBIC, **RAW)
    pixels = noise(*size)
    theirs = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0, 0]
    image = ImageConfig(policy="native", whole_patches="cut", longest_edge_px=98, shortest_edge_px=37, min_tokens_per_image=1)
    resizing = make_resizing(image, model())
    grid = resizing.grid(*size)
    assert (grid.rows, grid.cols) == (theirs.shape[1] // 4, theirs.shape[2] // 4)
    seen = theirs[:, : grid.rows * 4, : grid.cols * 4]
    assert_close(resizing.cut(pixels, grid).view(3, *seen.shape[1:]).numpy().astype(np.int64), seen, f"idefics2 {size}")


def test_a_resampler_makes_equally_many_tokens_of_every_picture():
    resampled = model(kind="perceiver", bias=False, resampler={"num_latents": 6})
    image = ImageConfig(policy="native", whole_patches="stretch", longest_edge_px=100, min_tokens_per_image=1)
    resizing = make_resizing(image, resampled)
    for size in SIZES:
        grid = resizing.grid(*size)
        assert grid.tokens == 6 == resizing.least(*size) and grid.work.patches == grid.rows * grid.cols
        assert resampled.visual_tokens(grid.rows, grid.cols) == 6
    assert resampled.visual_tokens_per_tile == 6
    assert [grid.tokens for grid in plan_pictures([(64, 64), (32, 64)], resizing, image, max_tokens=12)] == [6, 6]
    with pytest.raises(ResizingError, match="needs at least 12"):
        plan_pictures([(64, 64), (32, 64)], resizing, image, max_tokens=11)


def test_factorised_positions_bound_rows_and_columns():
    vision = {"image_size_px": 32, "patch_size_px": 4, "class_token": False, "positions": "factorised"}
    resizing = make_resizing(ImageConfig(policy="native"), ModelConfig.model_validate({"vision": vision}))
    for size in SIZES:
        grid = resizing.grid(*size)
        assert max(grid.rows, grid.cols) <= 8
    assert resizing.grid(64, 32)[:2] == (8, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"policy": "split"}, "give it"),
        ({"policy": "tiles", "longest_edge_px": 100}, "longest_edge_px goes with policy=split or native"),
        ({"policy": "split", "longest_edge_px": 100, "whole_patches": "cut"}, "whole_patches goes with policy=native"),
        ({"policy": "native", "longest_edge_px": 10, "shortest_edge_px": 11}, "exceeds longest_edge_px=10"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageConfig.model_validate(fields)
