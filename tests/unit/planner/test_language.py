"""Counts of every language model that the proofs know, against the modules and FLOPs of its transformers class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megavlm.checkpoint.hf.reading import Problems, quiet_transformers
from megavlm.checkpoint.hf.registry import family
from megavlm.config.schema import ModelConfig
from megavlm.planner.flops import VisionWork, pack_flops
from megavlm.planner.parameters import parameter_blocks, params
from megavlm.testing.families import CASES

TEXT_CASES = [case for case in CASES if case.family == "causal_lm"]


def both(case: Any) -> tuple[Any, ModelConfig]:
    tf = quiet_transformers()
    config = case.config(tf)
    config._attn_implementation = "eager"
    return getattr(tf, family(case.family).hf_class).from_config(config), family(case.family).model_from_hf(config, Problems())


@pytest.mark.parametrize("case", TEXT_CASES, ids=lambda case: case.name)
def test_every_parameter_is_counted(case: Any) -> None:
    theirs, model = both(case)
    counts = params(model)
    assert set(counts) == {"language"}
    assert counts["language"].total == counts["language"].trainable == sum(p.numel() for p in theirs.parameters())
    for block in parameter_blocks(model, tensor=2):
        assert block.total // 2 <= block.local <= block.total


@pytest.mark.parametrize("case", [case for case in TEXT_CASES if "Mo" not in case.name and "xtral" not in case.name], ids=lambda c: c.name)
def test_flops_are_what_torch_counts(case: Any) -> None:
    theirs, model = both(case)
    with FlopCounterMode(display=False) as counter:
        theirs(input_ids=torch.arange(4, 24)[None])
    ours = pack_flops(model, [20], VisionWork(), 20)
    # Eager attention computes the masked half as well, and frequencies by a product of matrices.
    rotations = counter.flop_counts["Global"].get(torch.ops.aten.bmm, 0) - 2 * ours.by_part["language.attention"].forward
    assert ours.forward + ours.by_part["language.attention"].forward + rotations == counter.get_total_flops()
    assert 0 <= rotations <= 2 * 2 * 20 * model.language.head_width
