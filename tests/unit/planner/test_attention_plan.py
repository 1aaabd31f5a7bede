"""What each part of a model needs of attention, and forced backends that are refused before anything starts."""

from __future__ import annotations

from typing import Any

import pytest

from megavlm.config.schema import Recipe
from megavlm.planner.attention import attention_calls, attention_table, check_attention
from megavlm_kernels.packed_attention.selection import BackendError, Call


def recipe(attention: str = "auto", dtype: str = "bf16", device: str = "auto", **language: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"dir": "unused", "device": device},
            "model": {"language": {"hidden_size": 64, "num_attention_heads": 4, "num_layers": 4, **language}},
            "precision": {"dtype": dtype, "attention": attention},
            "data": {"sources": {"x": {"path": "unused"}}},
            "stages": [{"name": "s", "steps": 1, "mixture": {"x": 1.0}}],
        }
    )


def test_needs_of_each_part() -> None:
    mixed = recipe(sliding_window_tokens=8, sliding_layers=[0, 2], attention_softcap=30.0, head_dim=32)
    calls = attention_calls(mixed)
    assert calls["language"] == Call("bf16", 32, False, True) and calls["language, sliding layers"] == Call("bf16", 32, True, True)
    assert calls["vision"] == Call("bf16", mixed.model.vision.hidden_size // mixed.model.vision.num_attention_heads)
    assert list(attention_calls(recipe(sliding_window_tokens=8, sliding_layers=[0, 1, 2, 3]))) == ["language, sliding layers", "vision"]
    table = attention_table(mixed)
    assert "bf16, heads of 32, window, soft cap" in table and "sdpa, flash_attn" in table


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "varlen", "dtype": "fp32"}, r"precision\.attention=varlen cannot serve model\.language: .* not fp32"),
        ({"attention": "varlen", "attention_softcap": 30.0}, "soft cap"),
        ({"attention": "transformer_engine", "attention_softcap": 30.0}, "soft cap"),
        ({"attention": "flash_attn", "bidirectional": "prefix"}, "see each other both ways"),
        ({"attention": "flash_attn", "head_dim": 512}, "at most 256 wide"),
        ({"attention": "flash_attn", "device": "cpu"}, "needs a CUDA device"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BackendError, match=message):
        check_attention(recipe(**options))


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_what_can_be_is_not(attention: str) -> None:
    check_attention(recipe(attention, dtype="fp32", device="cpu", attention_softcap=30.0, bidirectional="prefix"))
    check_attention(recipe("flash_attn", attention_softcap=30.0))
