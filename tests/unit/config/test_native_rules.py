"""Recipes with a resampler, splitting and sizes by the longest side: what does not fit is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from megavlm.config.schema import ModelConfig, Recipe

RESAMPLED = {"kind": "perceiver", "bias": False, "resampler": {}}


def recipe(**blocks: Any) -> Recipe:
    data = {"sources": {"a": {"path": "x"}}} | blocks.pop("data", {})
    stages = [{"name": "all", "steps": 10, "mixture": {"a": {"weight": 1.0}}}]
    return Recipe.model_validate({"run": {"dir": "x"}, "data": data, "stages": stages, **blocks})


@pytest.mark.parametrize(
    ("projector", "message"),
    [
        ({"kind": "perceiver", "bias": False}, "go together"),
        ({"resampler": {}}, "go together"),
        (RESAMPLED | {"bias": True}, "set bias=false"),
        (RESAMPLED | {"num_layers": 1}, "num_layers"),
        (RESAMPLED | {"merge_linear": True}, "merge_linear"),
        (RESAMPLED | {"resampler": {"num_attention_heads": 6, "num_query_groups": 4}}, "num_attention_heads=6 is not a multiple"),
    ],
)
def test_a_resampler_refuses_what_it_does_not_have(projector: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"projector": projector})


def test_heads_of_the_resampler_must_divide_over_tensor_ranks() -> None:
    with pytest.raises(ValueError, match="does not divide model.projector.resampler.num_query_groups=4"):
        recipe(model={"projector": RESAMPLED}, parallel={"tensor": 8})
    assert recipe(model={"projector": RESAMPLED}, parallel={"tensor": 4}).model.visual_tokens_per_tile == 64


def test_anyres_arranges_patches_that_a_resampler_does_not_make() -> None:
    with pytest.raises(ValueError, match="policy=anyres arranges patches in a plane, and model.projector.kind=perceiver makes none"):
        recipe(model={"projector": RESAMPLED}, data={"image": {"policy": "anyres"}})
