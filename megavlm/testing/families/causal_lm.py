"""Tiny language models alone."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import VOCABULARY, text_config


def _text(kind: str, **changes: Any) -> Any:
    return lambda tf: text_config(tf, kind, **changes)


def _opt(tf: Any) -> Any:
    return tf.OPTConfig(
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=128,
        dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )


CASES = [
    Case("Llama 2, Vicuna", "causal_lm", _text("llama")),
    Case("OPT", "causal_lm", _opt),
    Case("Qwen2", "causal_lm", _text("qwen2", tie=True), slow=True),
    Case("Qwen3", "causal_lm", _text("qwen3"), slow=True),
]
