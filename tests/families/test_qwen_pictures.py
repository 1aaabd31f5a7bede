"""Pictures of odd sizes: our native resizing gives Qwen's models what transformers' own image processor gives them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.families.qwen2_vl import IMAGE_PAD
from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.seeded import picture_prompt
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.tokenizer import Tokenizer
from megavlm.testing.families import CASES
from megavlm.testing.families.case import Case

FAMILIES = {case.family: case for case in CASES if case.family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl") and not case.slow}
SIZES = [(64, 64), (37, 91), (9, 70), (133, 20), (7, 5), (200, 310)]
"""(width, height): as it is, odd, long, wide, below the least, above the most."""
LIMITS = ImageConfig(policy="native", min_tokens_per_image=6, max_tokens_per_image=300)
LEVEL = 1 / 255 / 0.26
"""One of 256 levels of a pixel, after normalising."""


def model_of(case: Case) -> ModelConfig:
    return case.kind.model_from_hf(case.config(quiet_transformers()), Problems())


def files(case: Case, image: ImageConfig) -> dict[str, dict[str, Any]]:
    return case.kind.processor_files(model_of(case), image, cast(Tokenizer, SimpleNamespace(image_token=IMAGE_PAD)))


def waves(width: int, height: int) -> np.ndarray:
    """A smooth picture (height, width, 3): on noise the order in which Pillow resizes lines and columns would show."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return np.round(127.5 + 100 * np.sin(x / 9 + c) * np.cos(y / 7 - c)).astype(np.uint8)


@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_and_grids_are_those_of_the_image_processor(name: str, tmp_path: Path) -> None:
    """transformers' processor is built from the file that an export writes; ours reads the limits back from the same file."""
    case = FAMILIES[name]
    model = model_of(case)
    for file, content in files(case, LIMITS).items():
        (tmp_path / file).write_text(json.dumps(content))
    image = family(name).image_from_hf(tmp_path, model)
    assert image == LIMITS
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(str(tmp_path))
    pictures = [waves(width, height) for width, height in SIZES]
    theirs = processor([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    ours = case.kind.hf_inputs(model, picture_prompt(model, image, [5, 6, 7, 8], pictures, 3))
    assert torch.equal(ours["image_grid_thw"], theirs["image_grid_thw"])
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    # Pillow's resize and torch's differ by up to two levels; a picture that keeps its size has the same pixels.
    assert float((ours["pixel_values"] - theirs["pixel_values"]).abs().max()) <= 2.1 * LEVEL
    untouched = int(ours["image_grid_thw"][0].prod())
    assert torch.allclose(ours["pixel_values"][:untouched], theirs["pixel_values"][:untouched], atol=1e-5)


def test_limits_that_are_no_whole_tokens_and_other_policies_are_refused(tmp_path: Path) -> None:
    case = FAMILIES["qwen2_vl"]
    model = model_of(case)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"min_pixels": 64 * 4, "max_pixels": 64 * 10 + 1, "image_mean": [0.5] * 3})
    )
    with pytest.raises(HuggingFaceError, match=r"max_pixels .* is 641, no multiple of the 8 x 8 pixels .* write 640"):
        case.kind.image_from_hf(tmp_path, model)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 64 * 5, "max_pixels": 64 * 10, "image_mean": [0.5] * 3}))
    assert case.kind.image_from_hf(tmp_path, model) == ImageConfig(policy="native", min_tokens_per_image=5, max_tokens_per_image=10)
    with pytest.raises(HuggingFaceError, match="policy=tiles, but Hugging Face's Qwen2VLForConditionalGeneration"):
        case.kind.check_pictures(model, ImageConfig(policy="tiles", max_tiles=4))
