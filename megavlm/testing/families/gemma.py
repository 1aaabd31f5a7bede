"""Tiny Gemma models alone; heads are not hidden_size / heads wide, windows are shorter than the proofs' samples and answers."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import VOCABULARY


def gemma_config(tf: Any, kind: str, **changes: Any) -> Any:
    """An LLM of 4 layers, 4 heads in 2 groups, 48 wide: "gemma", "gemma2" or "gemma3_text"."""
    small: dict[str, Any] = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if kind != "gemma":
        small |= {"query_pre_attn_scalar": 12, "sliding_window": 6}
    if kind == "gemma2":
        small |= {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}
    if kind == "gemma3_text":
        small["rope_parameters"] = {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        }
        small["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    cls = {"gemma": tf.GemmaConfig, "gemma2": tf.Gemma2Config, "gemma3_text": tf.Gemma3TextConfig}[kind]
    return cls(**(small | changes))


def _text(kind: str, **changes: Any) -> Any:
    return lambda tf: gemma_config(tf, kind, **changes)


CASES = [
    Case("Gemma", "causal_lm", _text("gemma", num_key_value_heads=1), slow=True),
    Case("Gemma 2", "causal_lm", _text("gemma2")),
    Case("Gemma 3 (text)", "causal_lm", _text("gemma3_text")),
    Case("Gemma 3 (text), untied, soft-capped logits", "causal_lm",
         _text("gemma3_text", tie_word_embeddings=False, final_logit_softcapping=4.0), slow=True),
]  # fmt: skip
