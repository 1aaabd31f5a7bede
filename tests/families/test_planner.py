"""The planner's counts of every family, against the parameters of its Hugging Face class."""

from __future__ import annotations

from megavlm.planner.parameters import parameter_blocks, params
from tests.families.conftest import Oracle


def test_parameters_are_hugging_faces(oracle: Oracle) -> None:
    assert sum(count.total for count in params(oracle.model).values()) == sum(p.numel() for p in oracle.hf.parameters())


def test_two_tensor_ranks_hold_at_least_half(oracle: Oracle) -> None:
    for whole, half in zip(parameter_blocks(oracle.model), parameter_blocks(oracle.model, tensor=2), strict=True):
        assert whole.total == whole.local == half.total and half.total <= 2 * half.local <= 2 * half.total
