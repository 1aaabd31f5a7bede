"""What windows, DeepStack and M-RoPE do not go with is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megavlm.config.schema import ModelConfig, Recipe

PLAIN = {"class_token": False, "pre_norm": False, "image_size_px": 56, "num_layers": 4, "feature_layer": -1}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "class token": ({"vision": {"positions": "rotary"}}, "positions=rotary is about patches in a plane: set class_token=false"),
    "registers": ({"vision": PLAIN | {"deepstack_layers": [1], "num_register_tokens": 2}}, "deepstack_layers is about patches in a plane"),
    "order": (
        {"vision": PLAIN | {"deepstack_layers": [2, 1]}},
        r"deepstack_layers=\[2, 1\] must be ascending numbers of layers, from 0 to 3",
    ),
    "above": ({"vision": PLAIN | {"deepstack_layers": [3], "feature_layer": -2}}, "names a layer above feature_layer=-2"),
    "full": ({"vision": PLAIN | {"attention_window_px": 28, "full_attention_layers": [4]}}, "full_attention_layers=.4. must be ascending"),
    "window": ({"vision": PLAIN | {"attention_window_px": 20}}, "attention_window_px=20 is not a multiple of patch_size_px=14"),
    "block": (
        {"vision": PLAIN | {"attention_window_px": 42}, "projector": {"pixel_shuffle": 2}},
        "attention_window_px=42 is not a multiple of the 28 px of a block of patches",
    ),
    "layers": (
        {"vision": PLAIN | {"deepstack_layers": [0, 1, 2]}, "language": {"num_layers": 2}},
        "names more layers than the LLM's 2",
    ),
    "newline": (
        {"projector": {"image_newline": True}, "language": {"mrope_sections": [16, 24, 24]}},
        "language.mrope_sections needs one visual token for each block of patches",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_refused(name: str) -> None:
    block, message = WRONG[name]
    with pytest.raises(ValidationError, match=message):
        ModelConfig.model_validate(block)


@pytest.mark.parametrize("policy", ["tiles", "anyres"])
def test_mrope_needs_pictures_in_a_plane(policy: str) -> None:
    recipe = {
        "run": {"dir": "x"},
        "model": {"language": {"mrope_sections": [16, 24, 24]}},
        "data": {"image": {"policy": policy}, "sources": {"a": {"path": "a"}}},
        "stages": [{"name": "s", "steps": 1, "mixture": {"a": 1}}],
    }
    with pytest.raises(ValidationError, match=r"set data.image.policy=native \(or fixed\)"):
        Recipe.model_validate(recipe)
    Recipe.model_validate(recipe | {"data": {"image": {"policy": "native"}, "sources": {"a": {"path": "a"}}}})
