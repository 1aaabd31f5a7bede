"""Counts of models with experts: every weight is counted, and only the experts that a token meets are computed."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest

from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import ModelConfig
from megavlm.planner.flops import VisionWork, pack_flops
from megavlm.planner.parameters import parameter_blocks
from megavlm.testing.families.moe import CASES


def model_of(case: Any) -> ModelConfig:
    return family(case.family).model_from_hf(case.config(quiet_transformers()), Problems())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_weight_is_counted(case: Any) -> None:
    model = model_of(case)
    blocks = [b for b in parameter_blocks(model) if b.module == "language"]
    links = family(case.family).links(model)
    assert sum(b.total for b in blocks) == sum(prod(link.shape) for link in links)
    experts = [b for b in parameter_blocks(model, tensor=2, expert=4) if b.part == "experts"]
    assert all(b.local * 4 == b.total for b in experts)
    assert {b.layer for b in experts} == set(range(model.language.num_layers)) - set(model.language.moe.dense_layers)


def test_a_token_costs_the_experts_that_it_meets() -> None:
    model = model_of(CASES[0])
    moe, width = model.language.moe, model.language.hidden_size
    more = model.model_copy(update={"language": model.language.model_copy(update={"moe": moe.model_copy(update={"top_k": 3})})})
    one, other = (pack_flops(m, [10], VisionWork(), 0).forward for m in (model, more))
    assert other - one == 10 * model.language.num_layers * 6 * width * moe.ffn_hidden_size
