"""config.json in and out, and what is refused: every refusal names the field and its value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf import TokenIds, config_from_hf, config_to_hf
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.config.schema import ModelConfig
from megavlm.testing.families import CASES
from megavlm.testing.tiny import tiny_model_config


def write(folder: Path, **changes: Any) -> Path:
    """A LLaVA config.json; a change's key is a dotted path."""
    config = config_to_hf(tiny_model_config(), TokenIds(image=3))
    for path, value in changes.items():
        block, *rest = path.split("__")
        target = config[block] if rest else config
        target[rest[0] if rest else block] = value
    (folder / "config.json").write_text(json.dumps(config))
    return folder


MODELS = [
    tiny_model_config(),
    tiny_model_config(tie_embeddings=True, qkv_bias=True, norm_eps=1e-6, rope_theta=1e6, max_positions=512),
    tiny_model_config(siglip=True, qk_norm=True, head_dim=16),
]


@pytest.mark.parametrize("model", MODELS)
def test_round_trip(tmp_path: Path, model: ModelConfig) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_to_hf(model, TokenIds(image=3))))
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_mean": model.vision.image_mean, "image_std": model.vision.image_std}})
    )
    back = config_from_hf(tmp_path)
    back.init_std = model.init_std
    assert back == model


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"text_config__hidden_act": "gelu"}, "text_config.hidden_act is 'gelu', supported: silu"),
        ({"vision_config__hidden_act": "relu"}, "vision_config.hidden_act is 'relu'"),
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu', supported: gelu"),
        ({"text_config__attention_bias": True}, "text_config.attention_bias is True"),
        ({"vision_feature_layer": [-2, -5]}, r"feature_layer=\[-2, -5\] does not name the output of one of 3 layers"),
        ({"text_config": {"model_type": "bert"}}, "text_config.model_type is 'bert'"),
        ({"vision_config": {"model_type": "vit"}}, "vision_config.model_type is 'vit'"),
        ({"model_type": "bert"}, "model_type='bert' is none of the families here"),
    ],
)
def test_unsupported_settings_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(HuggingFaceError, match=message):
        config_from_hf(write(tmp_path, **changes))


@pytest.mark.parametrize("block", ["", "text_config"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "fp8"])
def test_quantised_weights_are_refused_by_name(tmp_path: Path, block: str, method: str) -> None:
    write(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (values[block] if block else values)["quantization_config"] = {"quant_method": method}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(HuggingFaceError, match=f"quantization_config with quant_method='{method}'.*dequantise"):
        config_from_hf(tmp_path)


def test_quantisation_is_never_exported(tmp_path: Path) -> None:
    """An import of an older release may have kept such a block; the weights beside it are plain numbers."""
    write(tmp_path)
    base = json.loads((tmp_path / "config.json").read_text())
    base["quantization_config"] = base["text_config"]["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    out = config_to_hf(config_from_hf(tmp_path), TokenIds(image=3), base=base)
    assert "quantization_config" not in out and "quantization_config" not in out["text_config"]


def test_siglip_with_default_selection_would_drop_a_patch(tmp_path: Path) -> None:
    config = config_to_hf(tiny_model_config(siglip=True), TokenIds(image=3))
    assert config["vision_feature_select_strategy"] == "full"
    (tmp_path / "config.json").write_text(json.dumps(config | {"vision_feature_select_strategy": "default"}))
    with pytest.raises(HuggingFaceError, match="drops the first patch of an encoder without class token"):
        config_from_hf(tmp_path)


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("projector.pixel_shuffle", 2, "model.projector.pixel_shuffle=2"),
        ("projector.num_layers", 1, "model.projector.num_layers=1"),
        ("projector.hidden_size", 64, "model.projector.hidden_size=64"),
        ("vision.patch_bias", True, r"model\.vision\.patch_bias=True \(it has: False\)"),
        ("language.qk_norm", True, r"model\.language\.(qkv_bias|qk_norm)=True \(it has: False\)"),
    ],
)
def test_what_hugging_face_cannot_hold_is_named(path: str, value: Any, message: str) -> None:
    model = tiny_model_config(qkv_bias=True)
    block, field = path.split(".")
    setattr(getattr(model, block), field, value)
    with pytest.raises(HuggingFaceError, match=message):
        config_to_hf(model, TokenIds(image=3))


def test_image_token_outside_the_vocabulary() -> None:
    with pytest.raises(HuggingFaceError, match="id 101 lies outside the 101 tokens of model.language"):
        config_to_hf(tiny_model_config(), TokenIds(image=101))


def test_pixel_statistics_come_from_the_processor(tmp_path: Path) -> None:
    write(tmp_path)
    assert config_from_hf(tmp_path).vision.image_mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 1]}))
    assert config_from_hf(tmp_path).vision.image_mean == (0.1, 0.2, 0.3)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_mean": [0, 0, 0], "image_std": [1, 1, 1], "rescale_factor": 1.0}})
    )
    with pytest.raises(HuggingFaceError, match="rescaled by 1/255"):
        config_from_hf(tmp_path)


def test_no_folder_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(HuggingFaceError, match=r"has no config\.json"):
        config_from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HuggingFaceError, match=r"config\.json is damaged"):
        config_from_hf(tmp_path)


def test_what_a_block_refuses_is_told_without_pydantics_page(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "Qwen2-VL")
    values = case.config(quiet_transformers()).to_dict()
    values["vision_config"]["spatial_merge_size"] = 3
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(HuggingFaceError, match=r"config\.json: .*pixel_shuffle=3") as told:
        config_from_hf(tmp_path)
    assert "pydantic" not in str(told.value) and "validation error" not in str(told.value)
