"""Tiny language models alone."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import opt_config, text_config


def _text(kind: str, **changes: Any) -> Any:
    return lambda tf: text_config(tf, kind, **changes)


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    """Scaled rotary positions whose first training was shorter than the proofs' samples and answers."""
    return {"rope_type": kind, "rope_theta": 5000.0, **parameters}


LLAMA3 = _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=32)
LONGROPE = _rope(
    "longrope",
    short_factor=[1.0, 1.1, 1.3, 1.2, 1.4, 1.5],
    long_factor=[1.0, 1.7, 2.9, 4.3, 5.5, 7.0],
    original_max_position_embeddings=10,
    partial_rotary_factor=0.75,
)


CASES = [
    Case("Llama 2, Vicuna", "causal_lm", _text("llama")),
    Case("Llama 3.1 (scaled rotary positions)", "causal_lm", _text("llama", rope_parameters=LLAMA3)),
    Case("Llama 3.2 (the same, tied)", "causal_lm", _text("llama", tie=True, rope_parameters=LLAMA3), slow=True),
    Case("Llama, linear scaling, biases", "causal_lm",
         _text("llama", attention_bias=True, mlp_bias=True, rope_parameters=_rope("linear", factor=2.0)), slow=True),
    Case("Mistral", "causal_lm", _text("mistral", head_dim=16, sliding_window=None), slow=True),
    Case("Mistral, sliding window", "causal_lm", _text("mistral", sliding_window=6)),
    Case("Qwen2", "causal_lm", _text("qwen2", tie=True), slow=True),
    Case("Qwen2.5, YaRN", "causal_lm", _text("qwen2", rope_parameters=YARN), slow=True),
    Case("Qwen2, sliding window in upper layers", "causal_lm",
         _text("qwen2", use_sliding_window=True, sliding_window=6, max_window_layers=2), slow=True),
    Case("Qwen3", "causal_lm", _text("qwen3"), slow=True),
    Case("Phi-3", "causal_lm", _text("phi3"), slow=True),
    Case("Phi-3 long, Phi-4-mini (LongRoPE, part of each head)", "causal_lm",
         _text("phi3", hidden_size=64, rope_parameters=LONGROPE, original_max_position_embeddings=10)),
    Case("OPT", "causal_lm", opt_config),
]  # fmt: skip
