"""Balanced pipeline stages against every possible split."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

import pytest

from megavlm.config.schema import DataConfig, ModelConfig, ParallelConfig, StageConfig
from megavlm.planner.flops import FlopsModel, VisionWork, Work
from megavlm.planner.recompute import Again, LayerAgain, recomputed
from megavlm.planner.stages import (
    PackShape,
    balanced_split,
    chunk_costs,
    chunk_totals,
    mean_cost,
    microbatch_cost,
    play,
    settled,
    stage_table,
    typical_pack,
)
from megavlm.testing.tiny import tiny_model_config
from megavlm.topology.pipeline import PipelineError, PipelineSplit

PACK = PackShape([500, 300, 200], VisionWork.uniform(3, 196), 120)


def splits(layers: int, pipeline: int, virtual: int = 1) -> Iterator[PipelineSplit]:
    """Every split that is allowed, one by one."""
    chunks = pipeline * virtual
    for cuts in combinations(range(layers + chunks - 1), chunks - 1):
        counts = tuple(b - a - 1 for a, b in pairwise((-1, *cuts, layers + chunks - 1)))
        if all(counts[1:-1]):
            yield PipelineSplit(layers, pipeline, virtual, counts)


def random_cost(rng: random.Random, layers: int) -> list[Work]:
    """Stages' ends that weigh anything from nothing to several layers; layers of two kinds."""
    ends = [rng.choice([0, 1, 5, 17, 60]) for _ in range(2)]
    kinds = [rng.randint(5, 12), rng.randint(5, 12)]
    middle = [rng.choice(kinds) for _ in range(layers)]
    return [Work(cost, rng.choice([0, 2 * cost])) for cost in (ends[0], *middle, ends[1])]


@pytest.mark.parametrize("seed", range(12))
def test_no_split_has_a_faster_slowest_stage(seed: int) -> None:
    rng = random.Random(seed)
    layers, pipeline = rng.choice([(4, 2), (5, 3), (7, 4), (9, 3), (8, 2), (10, 5)])
    cost = random_cost(rng, layers)
    found = balanced_split(cost, pipeline)
    assert max(chunk_totals(found, cost)) == min(max(chunk_totals(split, cost)) for split in splits(layers, pipeline))
    best = min(play(split, [cost] * (4 * pipeline)).step_time for split in splits(layers, pipeline))
    assert play(found, [cost] * (4 * pipeline)).step_time <= best * 1.05, "the slowest stage decides about the step"


@pytest.mark.parametrize("seed", range(6))
def test_interleaved_splits_come_near_the_best_there_is(seed: int) -> None:
    rng = random.Random(100 + seed)
    layers, pipeline, virtual = rng.choice([(6, 2, 2), (8, 2, 2), (7, 2, 2), (8, 2, 3)])
    cost = random_cost(rng, layers)
    microbatches = [cost] * (3 * pipeline)
    best = min(play(split, microbatches).step_time for split in splits(layers, pipeline, virtual))
    found = play(balanced_split(cost, pipeline, virtual, 3 * pipeline), microbatches).step_time
    assert best <= found <= 1.03 * best
    if layers % (pipeline * virtual) == 0:
        assert found <= play(PipelineSplit(layers, pipeline, virtual), microbatches).step_time


def test_costs_of_chunks_are_those_of_the_pack() -> None:
    model = ModelConfig()
    flops = FlopsModel(model)
    cost = microbatch_cost(flops, [PACK, PACK])
    whole = flops.pack(*PACK)
    assert sum(w.forward for w in cost) == 2 * whole.forward and sum(w.backward for w in cost) == 2 * whole.backward
    vision = sum(work.total for part, work in whole.by_part.items() if part.startswith("vision") or part == "projector")
    assert cost[0].total == 2 * vision and cost[-1].total == 2 * whole.by_part["language.head"].total
    split = PipelineSplit(model.language.num_layers, 2, 2, (0, 5, model.language.num_layers - 6, 1))
    forward, backward = chunk_costs(split, [cost, cost])
    assert [f[0] + b[0] for f, b in zip(forward, backward, strict=True)] == chunk_totals(split, cost)
    assert forward[0] == [cost[0].forward] * 2 and backward[3] == [cost[-1].backward + cost[-2].backward] * 2
    assert sum(f[1] for f in forward) == 2 * whole.forward


def test_recomputed_layers_run_twice_and_the_head_does_not() -> None:
    flops = FlopsModel(ModelConfig())
    whole = recomputed(ParallelConfig(recompute="full"), ModelConfig())
    plain, again = microbatch_cost(flops, [PACK]), microbatch_cost(flops, [PACK], again=whole)
    layers = flops.pack(*PACK).by_part
    encoder_layers = layers["vision.linear"].forward + layers["vision.attention"].forward
    added = [b.backward - a.backward for a, b in zip(plain, again, strict=True)]
    assert added == [encoder_layers, *(w.forward for w in plain[1:-1]), 0], "neither patch embedding nor projector is run again"
    encoder = microbatch_cost(flops, [PACK], again=Again(encoder=whole.encoder))
    assert encoder[0] == again[0] and encoder[1:] == plain[1:]


def test_selective_recomputation_weighs_on_its_layers() -> None:
    """The stage with more layers has more to compute again: a balance that left it out would give it too many."""
    model = ModelConfig()
    flops = FlopsModel(model)
    again = recomputed(ParallelConfig(recompute="selective", recompute_modules=["mlp", "core_attn"], recompute_encoder="none"), model)
    plain, selective = microbatch_cost(flops, [PACK]), microbatch_cost(flops, [PACK], again=again)
    language = model.language
    mlp = 6 * language.hidden_size * language.ffn_hidden_size * 1000
    attention = 2 * language.hidden_size * (500**2 + 300**2 + 200**2)
    assert [b.backward - a.backward for a, b in zip(plain, selective, strict=True)] == [0, *[mlp + attention] * language.num_layers, 0]


def test_which_layers_are_recomputed() -> None:
    model, all_of_it = tiny_model_config(), LayerAgain(1.0, 1.0, 1.0)
    assert recomputed(ParallelConfig(), model) == Again()
    assert recomputed(ParallelConfig(recompute="selective"), model) == Again((LayerAgain(1.0),) * 2, (LayerAgain(1.0),) * 4)
    assert recomputed(ParallelConfig(recompute="full"), model) == Again((all_of_it,) * 2, (all_of_it,) * 4)
    some: dict[str, Any] = {"recompute": "full", "recompute_encoder": "none", "pipeline": 2, "recompute_layers": 1}
    first, not_at_all = recomputed(ParallelConfig(**some, layers_per_stage=[3, 1]), model), LayerAgain(0.0, 0.0, 0.0)
    assert first == Again((), (all_of_it, not_at_all, not_at_all, all_of_it)), "the first of each chunk"
    assert recomputed(ParallelConfig(**some, split="balanced"), model) == Again((), (LayerAgain(0.5, 0.5, 0.5),) * 4)


def test_what_several_ranks_repeat_weighs_as_much_more() -> None:
    flops = FlopsModel(ModelConfig())
    parts = flops.pack(*PACK).by_part
    projector = parts["projector"].total
    once, more = microbatch_cost(flops, [PACK]), microbatch_cost(flops, [PACK], copies={"vision": 3, "projector": 2})
    assert more[0].total == 3 * (once[0].total - projector) + 2 * projector and more[1:] == once[1:]


def test_an_encoder_as_heavy_as_the_llm_gets_a_stage_of_its_own() -> None:
    layer = Work(10, 20)
    assert balanced_split([Work(40, 80), *[layer] * 4, Work(0, 0)], 2).counts == (0, 4)
    # A frozen one has no backward pass, and room for a layer.
    assert balanced_split([Work(40, 0), *[layer] * 4, Work(0, 0)], 2).counts == (1, 3)
    # A vocabulary as heavy as the layers keeps the last stage to itself.
    assert balanced_split([Work(0, 0), *[layer] * 4, Work(40, 80)], 2).counts == (4, 0)
    assert balanced_split([Work(0, 0), *[layer] * 4, Work(0, 0)], 2).counts == (2, 2)


STAGE = StageConfig(name="a", steps=1, mixture={"x": 1.0})


def test_settled_says_how_many_layers_where() -> None:
    model, data = tiny_model_config(), DataConfig(tokenizer="x", sources={}, seq_len_tokens=64)
    balanced = ParallelConfig(pipeline=2, split="balanced")
    found = settled(balanced, model, STAGE, data, 4)
    assert found.split == "even" and found.layers_per_stage is not None and sum(found.layers_per_stage) == 4
    heavy = PackShape([64], VisionWork.uniform(200, 16), 4)
    assert settled(balanced, model, None, data, 4, [heavy]).layers_per_stage == [0, 4]
    text = STAGE.model_copy(update={"objective": "text"})
    assert settled(balanced, model, text, data, 4, [heavy]).layers_per_stage == [2, 2], "no encoder in a text stage"
    even = ParallelConfig(pipeline=2)
    assert settled(even, model, STAGE, data, 4) is even
    assert settled(ParallelConfig(split="balanced"), model, STAGE, data, 4) == ParallelConfig()


def test_typical_pack_fills_its_tokens_with_pictures_and_text() -> None:
    model, data = tiny_model_config(), DataConfig(tokenizer="x", sources={}, seq_len_tokens=100)
    pack = typical_pack(model, data)
    assert model.visual_tokens_per_tile == 16
    assert pack == PackShape([32, 32, 32], VisionWork.uniform(3, 16), 24)


def test_too_few_layers_are_told() -> None:
    cost = [Work(1, 1)] * 4
    assert balanced_split(cost, 4).counts == (0, 1, 1, 0)
    with pytest.raises(PipelineError, match=r"num_layers=2 .*pipeline=5 .* = 5 chunks: only the first and the last"):
        balanced_split(cost, 5)


def test_table_tells_flops_and_bubble() -> None:
    cost = microbatch_cost(FlopsModel(tiny_model_config()), [PackShape([40, 24], VisionWork.uniform(2, 16), 9)])
    text = stage_table(PipelineSplit(4, 2, 1, (1, 3)), [[cost] * 4] * 2)
    lines = text.splitlines()
    assert [line.split()[2] for line in lines[3:5]] == ["0", "1-3"]
    assert "100 %" in lines[4] and "100 %" not in lines[3]
    timeline = play(PipelineSplit(4, 2, 1, (1, 3)), [cost] * 4)
    assert f"idle {100 * timeline.bubble_share:.1f} %" in lines[-1] and "20.0 % if all" in lines[-1]
    # One data-parallel rank with half the work waits for the other.
    half = [Work(w.forward // 2, w.backward // 2) for w in cost]
    waits = stage_table(PipelineSplit(4, 2, 1, (1, 3)), [[cost] * 4, [half] * 4]).splitlines()[-1]
    assert float(waits.split("idle ")[1].split(" %")[0]) > 100 * timeline.bubble_share + 10


def test_mean() -> None:
    assert mean_cost([[Work(2, 4)], [Work(4, 8)]]) == [Work(3, 6)]
