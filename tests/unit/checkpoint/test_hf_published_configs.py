"""Configs as they are published, with fields left out and older names: read into the model that they mean, and counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint.hf import TokenIds, config_from_hf, config_to_hf
from megavlm.planner.parameters import params

SIGLIP = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}
MISTRAL = {"model_type": "mistral", "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
LLAMA = {"model_type": "llama", "num_attention_heads": 32, "rms_norm_eps": 1e-5}
LLAMA_3 = LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128259}
SMOL = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "head_dim": 64, "vocab_size": 49280}
PIXTRAL = {"model_type": "pixtral", "head_dim": 64, "hidden_act": "silu", "rope_theta": 10000.0}
NEMO = MISTRAL | {
    "hidden_size": 5120,
    "head_dim": 128,
    "num_hidden_layers": 40,
    "vocab_size": 131072,
    "rope_theta": 1e9,
    "sliding_window": None,
}
RESAMPLER = {"resampler_depth": 3, "resampler_head_dim": 96, "resampler_n_heads": 16, "resampler_n_latents": 64, "num_key_value_heads": 4}

PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Idefics2 8B": (
        {
            "model_type": "idefics2",
            "vision_config": SIGLIP | {"model_type": "idefics2", "image_size": 980},
            "perceiver_config": RESAMPLER | {"model_type": "idefics2"},
            "text_config": MISTRAL | {"vocab_size": 32003, "intermediate_size": 14336, "sliding_window": 4096},
        },
        64,
        8_402_768_112,
    ),
    "Idefics3 8B": (
        {
            "model_type": "idefics3",
            "vision_config": SIGLIP | {"model_type": "idefics3", "image_size": 364},
            "text_config": LLAMA_3,
            "scale_factor": 2,
        },
        169,
        8_462_086_384,
    ),
    "SmolVLM2 2.2B": (
        {
            "model_type": "smolvlm",
            "vision_config": SIGLIP | {"image_size": 384, "max_image_size": {"longest_edge": 384}, "use_base_siglip": False},
            "text_config": SMOL,
            "scale_factor": 3,
        },
        81,
        2_246_784_880,
    ),
    "Pixtral 12B": (
        {
            "model_type": "llava",
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "image_token_index": 10,
            "vision_config": PIXTRAL | {"image_size": 1024, "patch_size": 16, "is_composition": True},
            "text_config": NEMO | {"intermediate_size": 14336, "is_composition": True},
        },
        4096,
        12_682_739_712,
    ),
    "Mistral Small 3.1 24B": (
        {
            "model_type": "mistral3",
            "image_token_index": 10,
            "tie_word_embeddings": False,
            "vision_config": PIXTRAL | {"image_size": 1540, "patch_size": 14, "num_channels": 3},
            "text_config": NEMO | {"intermediate_size": 32768},
        },
        3025,
        24_011_361_280,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published(name: str, tmp_path: Path) -> None:
    config, tokens_per_tile, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = config_from_hf(tmp_path)
    assert model.visual_tokens_per_tile == tokens_per_tile
    assert sum(count.total for count in params(model).values()) == parameters
    back = config_to_hf(model, TokenIds(image=10, bos=1, eos=2, pad=0))
    assert back["model_type"] == config["model_type"]
