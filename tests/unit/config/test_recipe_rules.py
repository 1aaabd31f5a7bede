"""Combinations that cannot work are refused by the schema, before a process group or a model exists."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from megavlm.config.schema import Recipe


def recipe(stage: dict[str, Any] | None = None, **blocks: Any) -> Recipe:
    stages = [{"name": "all", "steps": 10, "mixture": {"a": 1.0}, **(stage or {})}]
    return Recipe.model_validate({"run": {"dir": "x"}, "data": {"sources": {"a": {"path": "x"}}}, "stages": stages, **blocks})


def test_defaults_are_accepted() -> None:
    assert recipe().stages[0].name == "all"
    assert recipe(parallel={"tensor": 4}).parallel.tensor == 4


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"image": {"min_tokens_per_image": 99}}, "min_tokens_per_image goes with policy=native, not fixed"),
        (
            {"image": {"policy": "tiles", "max_tiles": 2, "min_tokens_per_image": 50}},
            "min_tokens_per_image goes with policy=native, not tiles",
        ),
        ({"image": {"policy": "native", "anyres_grids": [[1, 2]]}}, "anyres_grids goes with policy=anyres, not native"),
        ({"patch_budget": "target"}, "patch_budget=target goes with max_patches_per_pack"),
    ],
)
def test_data_options_that_would_do_nothing(data: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(data={"sources": {"a": {"path": "x"}}, **data})
    # Written out with every default, as recipe.yaml is, it is still accepted.
    assert Recipe.model_validate(recipe(data={"sources": {"a": {"path": "x"}}}).model_dump()) == recipe()


@pytest.mark.parametrize("name", ["x.tmp", "a/b", "", "-a", "a b", "x.old"])
def test_stage_names_that_no_folder_should_have(name: str) -> None:
    with pytest.raises(ValidationError, match="name"):
        recipe({"name": name})


@pytest.mark.parametrize(
    ("stage", "words"),
    [
        ({"schedule": {"kind": "wsd", "warmup_steps": 5, "decay_steps": 6}}, r"warmup_steps=5 \+ decay_steps=6 exceed steps=10"),
        ({"schedule": {"kind": "cosine", "decay_steps": 6}}, "decay_steps=6 goes with kind=wsd"),
        ({"schedule": {"warmup_steps": 11}}, "warmup_steps=11 exceeds steps=10"),
        ({"projector": {"train": "last_layers", "last_layers": 1}}, "projector has no transformer layers"),
        ({"vision": {"train": "last_layers", "last_layers": 24}}, r"stages\[0\].vision.last_layers=24, but 23 layers"),
        ({"language": {"train": "last_layers", "last_layers": 33}}, r"language.last_layers=33, but 32 layers"),
        ({"optimizer": {"beta1": 1.0}}, "beta1"),
    ],
)
def test_stages_that_cannot_work(stage: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(stage)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"vision": {"num_attention_heads": 1}}, "does not divide model.vision.num_attention_heads=1"),
        ({"vision": {"ffn_hidden_size": 65}}, "does not divide model.vision.ffn_hidden_size=65"),
        ({"language": {"ffn_hidden_size": 65}}, "does not divide model.language.ffn_hidden_size=65"),
        ({"projector": {"hidden_size": 33}}, "does not divide model.projector.hidden_size=33"),
        ({"language": {"num_attention_heads": 1}}, "attention heads"),
    ],
)
def test_models_that_do_not_split_over_tensor_ranks(model: dict[str, Any], words: str) -> None:
    recipe(model=model)
    with pytest.raises(ValidationError, match=words):
        recipe(model=model, parallel={"tensor": 2})


def test_odd_heads_cannot_be_rotated() -> None:
    with pytest.raises(ValidationError, match="15 wide"):
        recipe(model={"language": {"head_dim": 15}})


TEXT = {"text_only": True, "family": "causal_lm"}


@pytest.mark.parametrize(
    ("stage", "model", "words"),
    [
        ({}, {}, r"stages\[0\].objective=multimodal, but model.text_only=true has no encoder: set objective=text"),
        ({"objective": "text", "vision": {"train": "full"}}, {}, r"stages\[0\].vision: model.text_only=true has no vision"),
        ({"objective": "text", "projector": {"lr_scale": 2.0}}, {}, r"stages\[0\].projector: model.text_only=true has no projector"),
        ({"objective": "text"}, {"vision": {"num_layers": 3}}, "leave vision out"),
        ({"objective": "text"}, {"projector": {"bias": False}}, "leave projector out"),
        ({"objective": "text", "language": {"train": "frozen"}}, {}, "nothing would train"),
        ({"objective": "text"}, {"language": {"linear_bias": True}}, "linear_bias=true needs qkv_bias=true"),
        ({"objective": "text"}, {"language": {"position_offset": 2}}, "position_offset=2 goes with positions=learned"),
        ({"objective": "text"}, {"language": {"positions": "learned", "max_positions": 64}}, "exceeds model.language.max_positions=64"),
    ],
)
def test_what_a_model_without_encoder_refuses(stage: dict[str, Any], model: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        recipe(stage, model=TEXT | model)


def test_a_model_without_encoder_splits_as_its_language_model() -> None:
    small = {"num_attention_heads": 6, "hidden_size": 48, "num_query_groups": 3, "ffn_hidden_size": 96}
    written = recipe({"objective": "text"}, model=TEXT | {"language": small}, parallel={"tensor": 3})
    assert Recipe.model_validate(written.model_dump()) == written
