"""Tiny InternVL models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import text_config

TILES = {"policy": "tiles", "max_tiles": 4, "thumbnail": True}


def _internvl(text: str, *, layer: int = -1, tie: bool = False, **vision: Any) -> Callable[[Any], Any]:
    small = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 16,
        "patch_size": 4,
    }
    return lambda tf: tf.InternVLConfig(
        vision_config=tf.InternVLVisionConfig(**(small | vision)),
        text_config=text_config(tf, text, tie=tie),
        image_token_id=3,
        image_seq_length=4,
        vision_feature_layer=layer,
        tie_word_embeddings=tie,
    )


_SIX_B: dict[str, Any] = {"norm_type": "rms_norm", "use_qk_norm": True}

CASES = [
    Case("InternVL3", "internvl", _internvl("qwen2", attention_bias=True), image=TILES),
    Case("InternVL2.5, InternViT 6B, Llama", "internvl", _internvl("llama", **_SIX_B), image=TILES),
    Case("InternVL, a middle layer, Qwen3 tied", "internvl", _internvl("qwen3", layer=-2, tie=True), image=TILES, slow=True),
    Case("InternVL, final norm", "internvl", _internvl("qwen2", use_mean_pooling=False, use_mask_token=True), image=TILES, slow=True),
]
