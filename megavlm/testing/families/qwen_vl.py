"""Tiny Qwen2-VL, Qwen2.5-VL and Qwen3-VL models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import VOCABULARY

NATIVE = {"policy": "native"}
_IDS = {"image_token_id": 3, "video_token_id": 2, "vision_start_token_id": 0, "vision_end_token_id": 1}
_TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_VISION: dict[str, Any] = {"depth": 3, "num_heads": 4, "patch_size": 4}


def _text(sections: list[int], **changes: Any) -> dict[str, Any]:
    return _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "mrope_section": sections}} | changes


def _qwen2(*, tie: bool = False, text: dict[str, Any] | None = None, **vision: Any) -> Callable[[Any], Any]:
    own = _VISION | {"embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2}
    return lambda tf: tf.Qwen2VLConfig(
        text_config=_text([2, 2, 2], **(text or {})), vision_config=own | vision, tie_word_embeddings=tie, **_IDS
    )


def _qwen25(*, tie: bool = False, **vision: Any) -> Callable[[Any], Any]:
    own = _VISION | {"hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 60, "window_size": 16, "fullatt_block_indexes": [1]}
    return lambda tf: tf.Qwen2_5_VLConfig(text_config=_text([1, 2, 3]), vision_config=own | vision, tie_word_embeddings=tie, **_IDS)


def _qwen3(*, tie: bool = False, **vision: Any) -> Callable[[Any], Any]:
    own = _VISION | {
        "hidden_size": 32,
        "out_hidden_size": 48,
        "intermediate_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    text = _text([4, 2, 2], head_dim=16)
    return lambda tf: tf.Qwen3VLConfig(text_config=text, vision_config=own | vision, tie_word_embeddings=tie, **_IDS)


CASES = [
    Case("Qwen2-VL", "qwen2_vl", _qwen2(), NATIVE),
    Case("Qwen2-VL, tied, odd number of LLM heads", "qwen2_vl", _qwen2(tie=True, text={"num_attention_heads": 6, "rope_parameters": {
        "rope_type": "default", "rope_theta": 5000.0, "mrope_section": [2, 1, 1]}}), NATIVE, slow=True),
    Case("Qwen2.5-VL", "qwen2_5_vl", _qwen25(), NATIVE),
    Case("Qwen2.5-VL, tied, windows in every layer", "qwen2_5_vl", _qwen25(tie=True, fullatt_block_indexes=[]), NATIVE, slow=True),
    Case("Qwen3-VL", "qwen3_vl", _qwen3(), NATIVE),
    Case("Qwen3-VL, tied, DeepStack on every layer", "qwen3_vl", _qwen3(tie=True, deepstack_visual_indexes=[0, 1, 2]), NATIVE, slow=True),
]  # fmt: skip
