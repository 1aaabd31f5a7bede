"""Pictures of Idefics2, Idefics3, SmolVLM, Pixtral and Mistral 3: the processor that an export writes makes what training made."""

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
from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.seeded import picture_prompt
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.tokenizer import Tokenizer
from megavlm.testing.families import CASES
from megavlm.testing.families.case import Case, make_hf

OWN_SIZE = {"policy": "native", "longest_edge_px": 40, "min_tokens_per_image": 1}
IMAGES: dict[str, dict[str, Any]] = {
    "idefics2": OWN_SIZE | {"whole_patches": "cut", "shortest_edge_px": 18},
    "idefics3": {"policy": "split", "longest_edge_px": 64},
    "smolvlm": {"policy": "split", "longest_edge_px": 48},
    "pixtral": OWN_SIZE | {"whole_patches": "stretch"},
    "mistral3": OWN_SIZE | {"whole_patches": "stretch"},
}
FAMILIES: dict[str, Case] = {case.family: case for case in CASES if case.family in IMAGES}
SIZES = [(40, 32), (37, 29), (64, 64), (9, 30), (90, 20), (16, 16)]
"""(width, height)."""
LEVEL = 1 / 255 / 0.26
"""One of 256 levels of a pixel, after normalising."""
TEXT = [5, 6, 7, 8]


def model_of(case: Case) -> ModelConfig:
    return case.kind.model_from_hf(case.config(quiet_transformers()), Problems())


def written(name: str, folder: Path, image: ImageConfig) -> ModelConfig:
    """The processor files of an export."""
    model = model_of(FAMILIES[name])
    tokenizer = cast(Tokenizer, SimpleNamespace(image_token="<image>"))
    for file, content in family(name).processor_files(model, image, tokenizer).items():
        (folder / file).write_text(json.dumps(content))
    return model


def processor_of(name: str, folder: Path) -> Any:
    tf = quiet_transformers()
    cls = {"mistral3": "Pixtral", "smolvlm": "SmolVLM"}.get(name, name.capitalize()) + "ImageProcessorPil"
    settings = json.loads((folder / "processor_config.json").read_text())
    own = {k: v for k, v in settings["image_processor"].items() if k != "image_processor_type"}
    if "spatial_merge_size" in settings:  # as PixtralProcessor calls its image processor
        side = settings["patch_size"] * settings["spatial_merge_size"]
        own["patch_size"] = {"height": side, "width": side}
    return getattr(tf, cls)(**own)


def waves(width: int, height: int) -> np.ndarray:
    """A smooth picture (height, width, 3): on noise the order in which Pillow resizes lines and columns would show."""
    y, x, c = np.mgrid[0:height, 0:width, 0:3]
    return np.round(127.5 + 100 * np.sin(x / 9 + c) * np.cos(y / 7 - c)).astype(np.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("name", FAMILIES)
def test_settings_come_back_and_pixels_are_the_processors(name: str, interpolation: str, tmp_path: Path) -> None:
    image = ImageConfig.model_validate(IMAGES[name] | {"interpolation": interpolation})
    family(name).check_pictures(model_of(FAMILIES[name]), image)
    model = written(name, tmp_path, image)
    assert family(name).image_from_hf(tmp_path, model) == image
    pictures = [waves(*size) for size in SIZES]
    processor = processor_of(name, tmp_path)
    for picture in pictures:
        theirs = processor(Image.fromarray(picture), return_tensors="pt")
        ours = family(name).hf_inputs(model, picture_prompt(model, image, TEXT, [picture], 3))
        height, width = ours["pixel_values"].shape[-2:]
        # Idefics2 leaves the pixels beside whole patches to its encoder, which does not look at them.
        seen = theirs["pixel_values"][..., :height, :width]
        assert ours["pixel_values"].shape == seen.shape
        assert float((ours["pixel_values"] - seen).abs().max()) <= 2.1 * LEVEL * (2 if image.policy == "split" else 1)
        if "image_sizes" in ours:
            assert ours["image_sizes"].tolist() == torch.as_tensor(theirs["image_sizes"]).tolist()


def test_pixels_beside_whole_patches_and_padding_change_nothing(tmp_path: Path) -> None:
    """Idefics2 on its own processor's output, padded and masked, with pictures that need no resizing: what it says of ours."""
    image = ImageConfig.model_validate(IMAGES["idefics2"])
    model = written("idefics2", tmp_path, image)
    hf = make_hf(FAMILIES["idefics2"], tmp_path / "hf")
    pictures = [waves(37, 29), waves(22, 39), waves(40, 20)]
    theirs = processor_of("idefics2", tmp_path)([Image.fromarray(picture) for picture in pictures], return_tensors="pt")
    prompt = picture_prompt(model, image, TEXT, pictures, 3)
    ours = family("idefics2").hf_inputs(model, prompt)
    assert ours["pixel_values"].shape != theirs["pixel_values"].shape
    with torch.no_grad():
        want = hf(input_ids=ours["input_ids"], **theirs).logits
        got = hf(**ours).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_other_pictures_are_refused_by_name(name: str, tmp_path: Path) -> None:
    model, kind = model_of(FAMILIES[name]), family(name)
    with pytest.raises(HuggingFaceError, match="data.image.policy=tiles"):
        kind.check_pictures(model, ImageConfig(policy="tiles", max_tiles=4))
    with pytest.raises(HuggingFaceError, match="max_tokens_per_image=9"):
        kind.check_pictures(model, ImageConfig.model_validate(IMAGES[name] | {"max_tokens_per_image": 9}))
    if name in ("pixtral", "mistral3"):
        with pytest.raises(HuggingFaceError, match="whole_patches=nearest"):
            kind.check_pictures(model, ImageConfig.model_validate(OWN_SIZE))
    else:
        with pytest.raises(HuggingFaceError, match="data.image_token='<pic>'"):
            kind.processor_files(model, ImageConfig(), cast(Tokenizer, SimpleNamespace(image_token="<pic>")))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 8, "width": 8}}))
    with pytest.raises(HuggingFaceError, match="longest_edge"):
        kind.image_from_hf(tmp_path, model)


def test_idefics2_quarters_and_other_tiles_of_idefics3_are_refused(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 40}, "do_image_splitting": True}))
    with pytest.raises(HuggingFaceError, match=r'do_image_splitting=false into that file, or train with data.image={"policy": "native"'):
        family("idefics2").image_from_hf(tmp_path, model_of(FAMILIES["idefics2"]))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": {"longest_edge": 40}, "max_image_size": {"longest_edge": 24}}))
    with pytest.raises(HuggingFaceError, match="max_image_size is 24, but the encoder's tiles are 16 pixels"):
        family("idefics3").image_from_hf(tmp_path, model_of(FAMILIES["idefics3"]))
