"""A profile of steps or ranks that there are not is refused before the run."""

from __future__ import annotations

from typing import Any

import pytest

from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.training.layout import check_layouts


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        ({"first_step": 7}, "first_step=7, and the recipe's stages have 6 steps together"),
        ({"first_step": 6, "trace_ranks": [0, 2]}, "names rank 2, and there are 2 ranks"),
        ({"first_step": 6, "trace_ranks": [1]}, None),
        ({"first_step": 6, "trace_ranks": "all"}, None),
        ({"trace_ranks": [5]}, None),
    ],
)
def test_steps_and_ranks(profile: dict[str, Any], message: str | None) -> None:
    stages = [tiny_stage("one", steps=2), tiny_stage("two", steps=4)]
    recipe = tiny_recipe("run", "data", stages, tracking={"profile": profile})
    if message is None:
        check_layouts(recipe, 2)
        return
    with pytest.raises(ValueError, match=message):
        check_layouts(recipe, 2)
