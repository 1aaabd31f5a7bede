"""Tiny language models alone."""

from __future__ import annotations

from typing import Any

from megavlm.testing.families.case import Case
from megavlm.testing.families.parts import text_config


def _text(kind: str, **changes: Any) -> Any:
    return lambda tf: text_config(tf, kind, **changes)


CASES = [
    Case("Llama 2, Vicuna", "causal_lm", _text("llama")),
    Case("Qwen2", "causal_lm", _text("qwen2", tie=True), slow=True),
    Case("Qwen3", "causal_lm", _text("qwen3"), slow=True),
]
