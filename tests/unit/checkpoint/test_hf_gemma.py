"""PaliGemma's and Gemma 3's processors both ways, and settings of their configs that are refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf import config_from_hf, config_to_hf
from megavlm.checkpoint.hf.families.base import Family, TokenIds
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.resizing import make_resizing
from megavlm.planner.parameters import params
from megavlm.testing.families import CASES

TOKENS = {"paligemma": "<image>", "gemma3": "<image_soft_token>"}
IDS = TokenIds(image=3, bos=1, eos=2, pad=0, more={"boi_token_index": 4, "eoi_token_index": 5})


def hf_values(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of the family's first tiny model; a change's key is a path of fields."""
    case = next(case for case in CASES if case.family == name)
    values: dict[str, Any] = {"architectures": [case.kind.hf_class], **case.config(quiet_transformers()).to_dict()}
    for path, value in changes.items():
        *blocks, field = path.split("__")
        block = values
        for part in blocks:
            block = block[part]
        block[field] = value
    return values


def read(folder: Path, name: str, **changes: Any) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(hf_values(name, **changes)))
    return config_from_hf(folder)


def image_of(kind: Family, **values: Any) -> ImageConfig:
    image = ImageConfig.model_validate(values)
    return image.model_copy(update={"marks": kind.marks(image)}) if kind.name == "gemma3" else image


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "lanczos"])
@pytest.mark.parametrize("name", TOKENS)
def test_processor_makes_our_pixels(name: str, interpolation: str, tmp_path: Path) -> None:
    kind, model = family(name), read(tmp_path, name)
    image = image_of(kind, interpolation=interpolation)
    for file, content in kind.processor_files(model, image, SimpleNamespace(image_token=TOKENS[name])).items():  # type: ignore[arg-type]
        (tmp_path / file).write_text(json.dumps(content))
    assert kind.image_from_hf(tmp_path, model).interpolation == interpolation
    kind.check_pictures(model, image)
    processor = quiet_transformers().AutoImageProcessor.from_pretrained(str(tmp_path))
    picture = (np.add.outer(np.arange(40), np.arange(70) * 2)[..., None] + np.array([0, 20, 50])).astype(np.uint8)
    theirs = processor(images=[Image.fromarray(picture)], return_tensors="pt")["pixel_values"]
    resizing = make_resizing(image, model)
    tiles = resizing.cut(picture, resizing.grid(70, 40))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (model.vision.image_mean, model.vision.image_std))
    assert theirs.shape == tiles.shape
    assert float(((theirs * std + mean) * 255 - tiles).abs().max()) <= 2.01


@pytest.mark.parametrize("name", TOKENS)
def test_pictures_that_the_processor_cannot_make(name: str, tmp_path: Path) -> None:
    kind, model = family(name), read(tmp_path, name)
    for values, message in (({"fit": "crop"}, "fit=crop"), ({"policy": "native"}, "policy=native")):
        with pytest.raises(HuggingFaceError, match=message):
            kind.check_pictures(model, ImageConfig.model_validate(values))
    with pytest.raises(HuggingFaceError, match="data.image_token='<x>'"):
        kind.processor_files(model, image_of(kind), SimpleNamespace(image_token="<x>"))  # type: ignore[arg-type]
    if name == "gemma3":
        with pytest.raises(HuggingFaceError, match=r"marks.before=''.*writes '\\n\\n<start_of_image>'"):
            kind.processor_files(model, ImageConfig(), SimpleNamespace(image_token=TOKENS[name]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gemma3", {"do_pan_and_scan": True}, "do_pan_and_scan is true"),
        ("gemma3", {"resample": 4}, r"resample is 4 \(box\), supported: 1 \(lanczos\), 2 \(bilinear\), 3 \(bicubic\)"),
        ("paligemma", {"resample": 0}, "resample is 0"),
    ],
)
def test_processors_that_are_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = read(tmp_path, name)
    block = {"size": {"height": 16, "width": 16}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **changes}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(block))
    with pytest.raises(HuggingFaceError, match=message):
        family(name).image_from_hf(tmp_path, model)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("paligemma", {"image_token_index": 200}, "image_token_index is 200, beyond text_config.vocab_size=101"),
        ("paligemma", {"projection_dim": 40}, "projection_dim is 40, supported: 48"),
        ("paligemma", {"text_config__attention_bias": True}, "text_config.attention_bias is True"),
        ("gemma3", {"mm_tokens_per_image": 9}, "mm_tokens_per_image is 9, supported: squares of divisors of 4 patches"),
        ("gemma3", {"text_config__final_logit_softcapping": 30.0}, "text_config.final_logit_softcapping is 30.0"),
        ("gemma3", {"text_config__attn_logit_softcapping": 30.0}, "text_config.attn_logit_softcapping is 30.0"),
        ("gemma3", {"text_config__use_bidirectional_attention": True}, "text_config.use_bidirectional_attention is True"),
        ("gemma3", {"text_config__layer_types": ["sliding_attention"] * 3 + ["chunked_attention"]}, "layer_types has chunked_attention"),
    ],
)
def test_settings_that_are_refused(name: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(HuggingFaceError, match=message):
        read(tmp_path, name, **changes)


@pytest.mark.parametrize("name", TOKENS)
def test_the_planner_counts_every_weight(name: str, tmp_path: Path) -> None:
    model = read(tmp_path, name)
    theirs = sum(math.prod(part.shape) for link in family(name).links(model) for part in link.parts)
    assert sum(count.total for count in params(model).values()) == theirs


def test_other_classes_do_not_hold_them(tmp_path: Path) -> None:
    """Neither a LLaVA nor a Gemma alone says which tokens see each other both ways."""
    model = read(tmp_path, "paligemma")
    assert model.language.bidirectional == "prefix" and model.language.embedding_scale == 48**0.5
    with pytest.raises(HuggingFaceError, match="bidirectional"):
        config_to_hf(model.model_copy(update={"family": "llava"}), IDS)
    with pytest.raises(HuggingFaceError, match="bidirectional"):
        config_to_hf(model.model_copy(update={"family": "causal_lm", "text_only": True}), IDS)
    softer = model.model_copy(update={"language": model.language.model_copy(update={"embedding_scale": 2.0})})
    with pytest.raises(HuggingFaceError, match="embedding_scale"):
        config_to_hf(softer, IDS)
