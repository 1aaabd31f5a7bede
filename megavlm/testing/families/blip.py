"""Tiny BLIP-2 models."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import opt_config, text_config

_VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4}
_QFORMER = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 40, "cross_attention_frequency": 2}


def _blip_2(text: Any, **vision: Any) -> Any:
    def config(tf: Any) -> Any:
        return tf.Blip2Config(
            vision_config=_VISION | vision, qformer_config=_QFORMER, text_config=text(tf), num_query_tokens=5, image_token_index=3
        )

    return config


def _instructblip(tf: Any) -> Any:
    return tf.InstructBlipConfig(
        vision_config=_VISION,
        qformer_config=_QFORMER | {"vocab_size": 40, "max_position_embeddings": 16},
        text_config=text_config(tf, "llama"),
        num_query_tokens=5,
        image_token_index=3,
    )


def _qwen2(tf: Any) -> Any:
    return text_config(tf, "qwen2")


_FIXED = {"policy": "fixed", "fit": "stretch"}

CASES = [
    Case("BLIP-2", "blip-2", _blip_2(opt_config), image=_FIXED),
    Case("BLIP-2, Qwen2, encoder without biases of queries", "blip-2", _blip_2(_qwen2, qkv_bias=False), image=_FIXED, slow=True),
    Case("InstructBLIP", "instructblip", _instructblip, image=_FIXED),
]
