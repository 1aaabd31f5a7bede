"""Mllama beyond the table of proofs: its published config, its processor both ways, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf import TokenIds, config_from_hf, config_to_hf
from megavlm.checkpoint.hf.config import image_config_from_hf
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import ImageConfig
from megavlm.data.resizing import make_resizing
from megavlm.planner.parameters import params
from megavlm.testing.families.mllama import CASES

ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
PUBLISHED = {
    "architectures": ["MllamaForConditionalGeneration"],
    "model_type": "mllama",
    "image_token_index": 128256,
    "text_config": {
        "model_type": "mllama_text_model",
        "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_scaling": ROPE,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "vocab_size": 128256,
    },
    "vision_config": {
        "model_type": "mllama_vision_model",
        "attention_heads": 16,
        "hidden_size": 1280,
        "image_size": 560,
        "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "intermediate_size": 5120,
        "max_num_tiles": 4,
        "num_global_layers": 8,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "vision_output_dim": 7680,
    },
}
"""Llama 3.2 11B Vision Instruct."""


def folder_of(tmp_path: Path, **changes: Any) -> Path:
    values = CASES[0].config(quiet_transformers()).to_dict()
    for name, value in changes.items():
        block, _, field = name.partition("__")
        values[block][field] = value
    (tmp_path / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return tmp_path


def test_the_published_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED), encoding="utf-8")
    model = config_from_hf(tmp_path)
    assert model.visual_tokens_per_tile == 1601 and model.vision.feature_size == 7680
    assert model.language.rope_scaling is not None and model.language.rope_scaling.kind == "llama3"
    assert model.language.num_tokens == 128264
    tf = quiet_transformers()
    with torch.device("meta"):
        theirs = tf.MllamaForConditionalGeneration(tf.AutoConfig.from_pretrained(str(tmp_path)))
    assert sum(count.total for count in params(model).values()) == sum(p.numel() for p in theirs.parameters())
    back = config_to_hf(model, TokenIds(image=128256, bos=128000, eos=128001, pad=128004))
    assert back["text_config"]["cross_attention_layers"] == PUBLISHED["text_config"]["cross_attention_layers"]  # type: ignore[index]


def test_its_processor_both_ways(tmp_path: Path) -> None:
    model, kind = config_from_hf(folder_of(tmp_path)), family("mllama")
    files = kind.processor_files(model, ImageConfig(policy="canvas"), SimpleNamespace(image_token="<|image|>"))  # type: ignore[arg-type]
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    assert image_config_from_hf(tmp_path) == ImageConfig(policy="canvas")
    processor = quiet_transformers().AutoImageProcessor.from_pretrained(str(tmp_path))
    assert type(processor).__name__.startswith("MllamaImageProcessor") and processor.max_image_tiles == 4
    assert make_resizing(ImageConfig(policy="canvas"), model).grid(40, 10).tokens == 1
    with pytest.raises(HuggingFaceError, match=r"<\|image\|>"):
        kind.processor_files(model, ImageConfig(policy="canvas"), SimpleNamespace(image_token="<image>"))  # type: ignore[arg-type]
    with pytest.raises(HuggingFaceError, match="policy=fixed"):
        kind.check_pictures(model, ImageConfig())


@pytest.mark.parametrize(("field", "value"), [("max_image_tiles", 2), ("resample", 0), ("size", {"height": 20, "width": 20})])
def test_other_processors_are_refused(field: str, value: Any, tmp_path: Path) -> None:
    block = {"size": {"height": 16, "width": 16}, "resample": 2, "max_image_tiles": 4, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder_of(tmp_path) / "preprocessor_config.json").write_text(json.dumps(block | {field: value}), encoding="utf-8")
    with pytest.raises(HuggingFaceError, match=field):
        image_config_from_hf(tmp_path)


@pytest.mark.parametrize(
    ("change", "value", "message"),
    [
        ("vision_config__norm_eps", 1e-6, "norm_eps"),
        ("vision_config__supported_aspect_ratios", [[1, 1], [2, 1]], "supported_aspect_ratios"),
        ("vision_config__vision_output_dim", 64, "vision_output_dim"),
    ],
)
def test_other_settings_are_refused(change: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(HuggingFaceError, match=message):
        config_from_hf(folder_of(tmp_path, **{change: value}))


def test_other_models_are_no_mllama(tmp_path: Path) -> None:
    model = config_from_hf(folder_of(tmp_path))
    flamingo = model.model_copy(deep=True)
    assert flamingo.language.cross_attention is not None
    flamingo.language = flamingo.language.model_copy(
        update={"cross_attention": flamingo.language.cross_attention.model_copy(update={"mlp_without_picture": True})}
    )
    with pytest.raises(HuggingFaceError, match="mlp_without_picture"):
        config_to_hf(flamingo, TokenIds(image=101, bos=1, eos=2, pad=0))
