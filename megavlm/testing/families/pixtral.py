"""Tiny Pixtral and Mistral 3 models."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import text_config


def _vision(tf: Any) -> Any:
    return tf.PixtralVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=16, patch_size=4, hidden_act="silu"
    )


def _pixtral(tf: Any) -> Any:
    return tf.LlavaConfig(
        vision_config=_vision(tf),
        text_config=text_config(tf, "mistral", sliding_window=None, head_dim=16),
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _mistral3(tf: Any) -> Any:
    return tf.Mistral3Config(
        vision_config=_vision(tf),
        text_config=text_config(tf, "mistral", sliding_window=None, head_dim=16),
        image_token_index=3,
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )


_NATIVE: dict[str, Any] = {"policy": "native", "whole_patches": "stretch", "longest_edge_px": 40, "min_tokens_per_image": 1}

CASES = [
    Case("Pixtral", "pixtral", _pixtral, image=_NATIVE),
    Case("Mistral 3", "mistral3", _mistral3, image=_NATIVE),
]
