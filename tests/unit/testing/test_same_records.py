"""The helper by which layouts are compared."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megavlm.testing.recipes import assert_same_records

REFERENCE = [{"step": 1, "loss": 2.0, "grad_norm": 5.0}, {"step": 2, "loss": 1.5, "grad_norm": 4.0}]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": 1.5 * (1 + 2e-5)}, "step 2: loss"),
        ({"grad_norm": 4.0 * (1 - 2e-4)}, "step 2: grad_norm"),
        ({"loss": math.nan}, "step 2: loss"),
        ({"step": 3}, ""),
    ],
    ids=str,
)
def test_what_differs_is_found(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_same_records([REFERENCE[0], REFERENCE[1] | changes], REFERENCE)


def test_fewer_steps_are_found_and_rounding_is_not() -> None:
    with pytest.raises(AssertionError):
        assert_same_records(REFERENCE[:1], REFERENCE)
    rounded = {"step": 2, "loss": 1.5 * (1 + 9e-6), "grad_norm": 4.0 * (1 - 9e-5)}
    assert_same_records([REFERENCE[0], rounded], REFERENCE)
    assert_same_records([REFERENCE[0], REFERENCE[1] | {"loss": 1.51}], REFERENCE, loss=1e-2)
