"""`resample` of image processors both ways, and a folder whose pictures cannot be read but need not be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf import image_config_from_hf
from megavlm.checkpoint.hf.processors import interpolation_of, resample_of
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.starting import complete
from megavlm.config.schema import ImageConfig
from megavlm.testing.families import CASES

CLASSES = (
    *("CLIP", "Siglip", "Siglip2", "Blip", "ViT", "Bit", "ConvNext", "Llava", "LlavaNext", "LlavaOnevision", "GotOcr2", "Pixtral"),
    *("Idefics2", "Idefics3", "SmolVLM", "Gemma3", "Mllama", "Qwen2VL"),
)
FILE = Path("preprocessor_config.json")


@pytest.mark.parametrize("name", CLASSES)
def test_without_a_word_the_classs_own(name: str) -> None:
    own = getattr(quiet_transformers(), f"{name}ImageProcessorPil").resample
    for suffix in ("", "Fast"):
        found = interpolation_of({"image_processor_type": f"{name}ImageProcessor{suffix}"}, FILE, "CLIPImageProcessor")
        assert resample_of(ImageConfig(interpolation=found)) == int(own)
    assert interpolation_of({}, FILE, f"{name}ImageProcessor") == found


@pytest.mark.parametrize(("code", "name"), [(0, r" \(nearest\)"), (4, r" \(box\)"), (5, r" \(hamming\)"), (9, "")])
def test_other_kernels_are_refused_by_name(code: int, name: str) -> None:
    with pytest.raises(HuggingFaceError, match=rf"resample is {code}{name}, supported: 1 \(lanczos\), 2 \(bilinear\), 3 \(bicubic\)"):
        interpolation_of({"resample": code}, FILE, "CLIPImageProcessor")


def folder_of(family: str, folder: Path, **processor: Any) -> Path:
    case = next(case for case in CASES if case.family == family)
    values = {"architectures": [case.kind.hf_class], **case.config(quiet_transformers()).to_dict()}
    (folder / "config.json").write_text(json.dumps(values))
    if processor:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize("code", [1, 2, 3])
@pytest.mark.parametrize("family", ["llava", "vipllava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "mllama", "blip-2"])
def test_every_family_reads_it(family: str, code: int, tmp_path: Path) -> None:
    sizes: dict[str, dict[str, int]] = {"internvl": {}, "qwen2_vl": {}, "qwen2_5_vl": {}, "qwen3_vl": {}}
    size = sizes.get(family, {"height": 16, "width": 16})
    image = image_config_from_hf(folder_of(family, tmp_path, size=size, resample=code))
    assert image.interpolation == {1: "lanczos", 2: "bilinear", 3: "bicubic"}[code]


def test_the_folders_pictures_are_read_only_where_the_recipe_gives_none(tmp_path: Path) -> None:
    """Idefics2 as published cuts pictures into quarters, which no policy does."""
    edges = {"longest_edge": 40, "shortest_edge": 18}
    folder = folder_of("idefics2", tmp_path, size=edges, do_image_splitting=True, resample=2)
    with pytest.raises(HuggingFaceError, match="do_image_splitting=true") as refused:
        complete({"init": {"from_hf": str(folder)}})
    # The message has a block that can be copied.
    image = json.loads(str(refused.value).split("data.image=")[1])
    assert image["interpolation"] == "bilinear" and image["marks"]["before"] == "<fake_token_around_image>"
    completed = complete({"init": {"from_hf": str(folder)}, "data": {"image": image}})
    assert completed["data"]["image"] == image and completed["model"]["family"] == "idefics2"
    written = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(written | {"do_image_splitting": False}))
    assert image_config_from_hf(folder) == ImageConfig.model_validate(image)
