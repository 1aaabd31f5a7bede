"""Tiny Idefics2, Idefics3 and SmolVLM models."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import text_config

_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}


def _idefics2(tf: Any) -> Any:
    return tf.Idefics2Config(
        vision_config=_VISION | {"image_size": 20},
        perceiver_config={
            "hidden_size": 48,
            "resampler_n_latents": 3,
            "resampler_depth": 2,
            "resampler_n_heads": 4,
            "resampler_head_dim": 8,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
        text_config=text_config(tf, "llama"),
        image_token_id=3,
    )


def _tiled(cls: str, *, tie: bool = False) -> Any:
    def config(tf: Any) -> Any:
        text = text_config(tf, "llama", tie=tie)
        return getattr(tf, cls)(vision_config=_VISION, text_config=text, scale_factor=2, image_token_id=3, tie_word_embeddings=tie)

    return config


_SPLIT: dict[str, Any] = {"policy": "tiles", "max_tiles": 4, "thumbnail": True}

CASES = [
    Case("Idefics2", "idefics2", _idefics2, image={"policy": "native"}),
    Case("Idefics3", "idefics3", _tiled("Idefics3Config"), image=_SPLIT),
    Case("SmolVLM", "smolvlm", _tiled("SmolVLMConfig", tie=True), image=_SPLIT, slow=True),
]
