"""Loss weights: InternVL's three averagings, times what sample, source and task say."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.config.data import LossConfig
from megavlm.data.loss_weights import Averaging, LossWeightError, target_weights


def len2weight(x, loss_reduction):
    """InternVL's formula, restated: internvl_chat_finetune.py."""
    return {"token": 1, "sample": 1 / x, "square": 1 / (x**0.5)}[loss_reduction] if x else x


@settings(max_examples=50, derandomize=True)
@given(st.integers(0, 100_000), st.sampled_from(get_args(Averaging)))
def test_averaging_equals_internvls(count, averaging):
    assert target_weights(count, 1.0, 1.0, 1.0, averaging) == pytest.approx(len2weight(count, averaging))


def test_weights_multiply():
    for averaging in get_args(Averaging):
        assert target_weights(9, 0.5, 3.0, 0.1, averaging) == pytest.approx(0.15 * target_weights(9, 1, 1, 1, averaging))
    assert target_weights(9, 1.0, 1.0, 0.0, "sample") == 0.0


def test_what_each_averaging_gives_the_same_share():
    """Two samples of 4 and 100 targets whose tokens lose 2 and 1 each: the weighted mean is what the name says."""
    counts, losses = np.array([4, 100]), np.array([2.0, 1.0])

    def loss(averaging):
        weights = np.array([target_weights(int(n), 1, 1, 1, averaging) for n in counts])
        return float((weights * counts * losses).sum() / (weights * counts).sum())

    assert loss("token") == pytest.approx((4 * 2 + 100 * 1) / 104)
    assert loss("sample") == pytest.approx((2 + 1) / 2)
    assert loss("square") == pytest.approx((math.sqrt(4) * 2 + math.sqrt(100) * 1) / (math.sqrt(4) + math.sqrt(100)))


def test_the_recipe_names_these_averagings():
    assert get_args(LossConfig.model_fields["averaging"].annotation) == get_args(Averaging)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, -1.0, 1.0, 1.0, "token"), "sample's loss weight is -1.0"),
        ((3, 1.0, float("nan"), 1.0, "token"), "source's loss weight"),
        ((3, 1.0, 1.0, float("inf"), "token"), "task's loss weight"),
        ((3, 1.0, 1.0, 1.0, "tokens"), "not one of token, sample, square"),
        ((-1, 1.0, 1.0, 1.0, "token"), "-1 targets"),
    ],
)
def test_what_is_no_weight_says_so(arguments, message):
    with pytest.raises(LossWeightError, match=message):
        target_weights(*arguments)
