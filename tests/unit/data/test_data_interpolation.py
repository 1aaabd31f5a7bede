"""data.image.interpolation: every policy resizes by the kernel it is told, as Hugging Face's processors on Pillow do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.resizing import make_resizing
from tests.unit.data.test_data_resizing import RAW, lines_first, noise  # noqa: F401

SIZES = [(640, 480), (480, 640), (13, 17), (1, 2000), (2000, 1), (333, 1000), (97, 33), (3000, 40)]
CODES = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
SQUARE = {"height": 32, "width": 32}
GRIDS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
POLICIES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "stretch": ({"fit": "stretch"}, "SiglipImageProcessorPil", {"size": SQUARE}),
    "crop": ({"fit": "crop"}, "CLIPImageProcessorPil", {"size": {"shortest_edge": 32}, "crop_size": SQUARE}),
    "pad": ({"fit": "pad"}, "LlavaImageProcessorPil", {"do_pad": True, "size": SQUARE, "crop_size": SQUARE}),
    "tiles": (
        {"policy": "tiles", "max_tiles": 6, "thumbnail": True},
        "GotOcr2ImageProcessorPil",
        {"size": SQUARE, "crop_to_patches": True, "max_patches": 6},
    ),
    "anyres": (
        {"policy": "anyres"},
        "LlavaNextImageProcessorPil",
        {
            "size": SQUARE,
            "crop_size": SQUARE,
            "image_grid_pinpoints": [[32 * a, 32 * b] for a, b in GRIDS],
        },
    ),
    "split": (
        {"policy": "split", "longest_edge_px": 128},
        "Idefics3ImageProcessorPil",
        {"size": {"longest_edge": 128}, "max_image_size": {"longest_edge": 32}},
    ),
    "native": (
        {"policy": "native", "whole_patches": "stretch", "longest_edge_px": 100, "min_tokens_per_image": 1},
        "PixtralImageProcessorPil",
        {"size": {"longest_edge": 100}, "patch_size": {"height": 4, "width": 4}, "do_pad": False},
    ),
    "qwen": (
        {"policy": "native", "max_tokens_per_image": 400},
        "Qwen2VLImageProcessorPil",
        {"patch_size": 4, "merge_size": 1, "temporal_patch_size": 1, "size": {"shortest_edge": 4 * 16, "longest_edge": 400 * 16}},
    ),
}


@pytest.mark.parametrize("interpolation", CODES)
@pytest.mark.parametrize("policy", POLICIES)
def test_pixels_are_the_processors(policy: str, interpolation: str) -> None:
    """At most 2 of 256 levels, twice that where a picture is resized twice; of the same picture by another kernel many are further away."""
    import transformers

    values, name, settings = POLICIES[policy]
    vision = {"image_size_px": 32, "patch_size_px": 4, "class_token": False}
    projector = {"image_newline": policy == "anyres"}
    model = ModelConfig.model_validate({"vision": vision, "projector": projector})
    image = ImageConfig.model_validate(values | {"interpolation": interpolation})
    resizing = make_resizing(image, model)
    processor = getattr(transformers, name)(**settings, resample=CODES[interpolation], **RAW)
    for size in SIZES:
        if policy in ("native", "qwen") and max(size) > 50 * min(size):  # the processors make or take no such picture
            continue
        pixels = noise(*size)
        found = processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
        grid = resizing.grid(*size, image.max_tokens_per_image)
        ours = resizing.cut(pixels, grid).numpy().astype(np.int64)
        theirs = np.rint(np.asarray(found if policy != "split" else found[0], dtype=np.float64))
        if policy == "qwen":
            theirs = theirs.reshape(grid.rows, grid.cols, 3, 4, 4).transpose(2, 0, 3, 1, 4)
        assert ours.size == theirs.size, size
        difference = np.abs(ours.ravel() - theirs.ravel())
        assert difference.max() <= (4 if policy == "split" and interpolation != "lanczos" else 2), (size, difference.max())


def test_kernels_differ_and_canvas_is_bilinear_unless_told() -> None:
    pixels = noise(64, 48)
    model = ModelConfig.model_validate({"vision": {"image_size_px": 32, "patch_size_px": 4}})
    tiles = {}
    for name in CODES:
        resizing = make_resizing(ImageConfig.model_validate({"interpolation": name}), model)
        tiles[name] = resizing.cut(pixels, resizing.grid(64, 48)).numpy().astype(np.int64)
    for one, other in (("lanczos", "bicubic"), ("bilinear", "bicubic"), ("lanczos", "bilinear")):
        assert np.abs(tiles[one] - tiles[other]).max() > 10
    assert ImageConfig(policy="canvas").interpolation == ImageConfig.model_validate_json('{"policy": "canvas"}').interpolation == "bilinear"
    assert ImageConfig(policy="canvas", interpolation="bicubic").interpolation == "bicubic"
