"""What --dry-run and the accounting say of a context split: against counting, row by row and pair by pair."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import pytest

from megavlm.config.parallel import ContextSplit
from megavlm.config.schema import ParallelConfig
from megavlm.data.types import PackPlan, StepPlan
from megavlm.planner.context import check_context, pad_rows, segments_of, split_cost, split_table
from megavlm.planner.flops import FlopsModel, VisionWork, pack_flops
from megavlm.planner.memory import estimate_memory
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.testing.tiny import tiny_model_config
from megavlm.topology.context import context_layout
from megavlm.topology.grid import RankGrid
from megavlm.training.accounting import Accountant
from megavlm_kernels.context_attention import CommError

PACKS = [(100, 3, 17, 40), (61, 99)]


@dataclass(frozen=True)
class Lengths:
    lengths_tokens: tuple[int, ...]


def test_segments_of_a_microbatch() -> None:
    """As the materialiser lays packs out: each pack's samples, then its padding."""
    assert segments_of([Lengths((5, 3)), Lengths((10,)), Lengths((9,))], 10) == (5, 3, 2, 10, 9, 1)


@pytest.mark.parametrize("split", get_args(ContextSplit))
def test_cost_is_that_of_each_ranks_rows_and_pairs(split: ContextSplit) -> None:
    model, parallel = tiny_model_config(), ParallelConfig(context=2, context_split=split)
    flops, nothing = FlopsModel(model), VisionWork()
    by_part = pack_flops(model, [1], nothing, 0).by_part
    a_row = by_part["language.linear"].total
    a_square = by_part["language.attention"].total
    busiest = everything = 0.0
    for lengths in PACKS:
        layout = context_layout(lengths, split, 2)
        costs = [layout.num_rows * (a_row - a_square) + 2 * a_square * pairs for pairs in layout.work().pairs]
        busiest, everything = busiest + max(costs), everything + sum(costs)
        if not layout.work().pads:
            assert sum(costs) == pytest.approx(flops.total(lengths, nothing, 0) - flops.total([], nothing, 0))
    cost = split_cost(model, None, PACKS, parallel)
    assert cost.language == pytest.approx(2 * busiest / everything)
    assert cost.rows == 320 and cost.pads == sum(pad_rows(lengths, parallel) for lengths in PACKS)
    assert 1.0 <= cost.attention <= cost.attention_at_worst
    assert 0 < cost.travelling <= 1
    shown = split_table(model, None, PACKS, parallel)
    assert "context splits of 2 microbatches over 2 ranks" in shown
    (row,) = [line for line in shown.splitlines() if split in line]
    for number in (cost.pads, f"{cost.attention:.3f}", f"{cost.language:.3f}", f"{100 * cost.travelling:.0f} %", "this recipe"):
        assert str(number) in row


def test_one_context_rank_has_no_pads() -> None:
    assert pad_rows((3, 5), ParallelConfig()) == 0


def test_pads_are_physical_tokens_and_not_useful_ones() -> None:
    recipe = tiny_recipe("run", "data", parallel={"context": 2, "context_split": "zigzag"})
    pack = PackPlan((), (100, 51), VisionWork(), 3, 1e9)
    plan = StepPlan(1, (((pack,), (pack,)),), {})
    shared, alone = (Accountant(recipe, recipe.stages[0], 2, None).record(plan, 1.0, 0.0, 256, context) for context in (2, 1))
    # 100, 51 and 105 rows in four chunks each: 0, 1 and 3 pads.
    assert shared["tokens"] == 2 * (256 + 4) and alone["tokens"] == 2 * 256
    assert shared["pack_fill"] == pytest.approx(151 / 260)
    assert shared["useful_tokens"] == alone["useful_tokens"] == 302 and shared["tokens_per_s"] == alone["tokens_per_s"]


def test_memory_has_room_for_pads() -> None:
    recipe = tiny_recipe("run", "data", parallel={"context": 4, "context_split": "zigzag"})
    grid = RankGrid.from_config(recipe.parallel, 4)
    few, many = (
        estimate_memory(recipe.model, recipe.stages[0], recipe.data, grid, recipe.parallel, recipe.precision, segments)[0].activations_bytes
        for segments in (0, 40)
    )
    # 64 rows of a rank, and up to 40 x 7 pads over four ranks: 134.
    assert 1.3 * few < many < 2.1 * few


@pytest.mark.parametrize(
    ("parallel", "model", "message"),
    [
        ({"context_comm": "keys"}, {}, "context_comm=keys, but parallel.context=1: there are no context ranks"),
        ({"context": 2, "context_comm": "p2p"}, {}, "wants parallel.context_split=zigzag, not pack"),
        (
            {"context": 2, "context_comm": "p2p", "context_split": "zigzag"},
            {"attention_softcap": 5.0},
            "cannot serve model.language: .* no soft cap",
        ),
        (
            {"context": 2, "context_comm": "p2p", "context_split": "zigzag"},
            {"sliding_window_tokens": 7, "sliding_layers": [1]},
            "cannot serve model.language, sliding layers: the ring has no sliding window",
        ),
        (
            {"context": 4, "context_comm": "a2a", "context_split": "zigzag"},
            {},
            "4 context ranks, which do not divide a tensor rank's 4 query heads and 2 key heads",
        ),
        # Two key heads on four tensor ranks: each has a copy of one, and two context ranks do not divide it.
        ({"tensor": 4, "context": 2, "context_comm": "a2a", "context_split": "zigzag"}, {}, "1 query heads and 1 key heads"),
        ({"context": 2, "context_comm": "a2a", "context_split": "zigzag"}, {}, "it needs a CUDA device"),
    ],
)
def test_what_no_machine_has_is_refused_before_the_start(parallel: dict[str, object], model: dict[str, object], message: str) -> None:
    recipe = tiny_recipe(Path("run"), "data", [tiny_stage()], parallel=parallel, model={"language": model}, precision={"dtype": "bf16"})
    with pytest.raises(CommError, match=message):
        check_context(recipe)


def test_what_is_there_everywhere_is_not_refused() -> None:
    for parallel in ({}, {"context": 2}, {"context": 2, "context_comm": "keys", "context_split": "zigzag"}):
        check_context(tiny_recipe("run", "data", parallel=parallel))
