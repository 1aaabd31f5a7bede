"""A model with experts trains alike however its experts, tensors, layers and sequences are spread."""

from __future__ import annotations

import gc
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.checkpoint import store
from megavlm.config.schema import DataConfig, ParallelConfig, PrecisionConfig, StageConfig
from megavlm.models.init import initialise
from megavlm.models.vlm import VisionLanguageModel
from megavlm.models.weights import sharded_tensors
from megavlm.parallel.context import enter_grid
from megavlm.planner.memory import estimate_memory
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.tiny import tiny_chunks, tiny_model_config
from megavlm.topology.grid import RankGrid

EXPERTS = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "dense_layers": [1]}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "EP2": (2, {"expert": 2}),
    "EP2+overlap": (2, {"expert": 2, "zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "PP2 unequal": (2, {"pipeline": 2, "layers_per_stage": [1, 3]}),
    "CP2xEP2": (2, {"context": 2, "expert": 2}),
    "EP2+recompute": (2, {"expert": 2, "recompute": "full"}),
    "EP4": (4, {"expert": 4}),
    "TP2+SP with EP2": (2, {"tensor": 2, "sequence": True, "expert": 2}),
    "TP2+SPxEP2": (4, {"tensor": 2, "sequence": True, "expert": 2}),
    "ZeRO-2": (2, {"zero": 2}),
    "ZeRO-3": (2, {"zero": 3}),
    "TP2+SP x ZeRO-3": (4, {"tensor": 2, "sequence": True, "zero": 3}),
    "PP2 x ZeRO-2": (4, {"pipeline": 2, "zero": 2}),
    "ZeRO-3+recompute": (2, {"zero": 3, "recompute": "full"}),
    "EP2 x ZeRO-3": (2, {"expert": 2, "zero": 3}),
    "EP2 x ZeRO-2 on four": (4, {"expert": 2, "zero": 2}),
    "EP2 x ZeRO-3 on four + recompute": (4, {"expert": 2, "zero": 3, "recompute": "full"}),
    "TP2+SPxEP2 x ZeRO-3": (4, {"tensor": 2, "sequence": True, "expert": 2, "zero": 3}),
    "CP2xEP2 x ZeRO-3": (2, {"context": 2, "expert": 2, "zero": 3}),
}


def train(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, moe: dict[str, Any], **blocks: Any) -> list[dict[str, Any]]:
    recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=3)], model={"language": {"moe": moe}}, **blocks)
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return records


@pytest.fixture(scope="session")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[dict[str, Any]]]:
    """By the coefficient of the balancing loss."""
    base = tmp_path_factory.mktemp("experts")
    return {c: train(pool, base / str(c), data_dir, 1, EXPERTS | {"aux_loss": c}) for c in (0.0, 0.1)}


# Without a balancing loss there is less that a layout could change.
QUICK = {
    *((name, 0.1) for name, (size, parallel) in LAYOUTS.items() if parallel.get("zero", 1) < 2 and size < 4),
    *((name, 0.1) for name in ("TP2+SPxEP2", "ZeRO-3+recompute", "EP2 x ZeRO-2 on four", "TP2+SPxEP2 x ZeRO-3")),
    ("EP2", 0.0),
}


@pytest.mark.parametrize(("layout", "aux_loss"), slow_unless(product(LAYOUTS, [0.0, 0.1]), lambda *case: case in QUICK))
def test_layouts(
    layout: str, aux_loss: float, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[float, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = train(pool, tmp_path, data_dir, world_size, EXPERTS | {"aux_loss": aux_loss}, parallel=parallel)
    assert_same_records(records, one_rank[aux_loss])


def models_alive() -> int:
    gc.collect()
    return sum(type(thing) is VisionLanguageModel for thing in gc.get_objects())


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_trained_model_can_be_collected(pool: RankPool, data_dir: Path, tmp_path: Path, recompute: str) -> None:
    """A tensor kept with its graph would hold the model's hooks, the model and its process groups for good."""
    before = pool.run(models_alive)[0]
    train(pool, tmp_path, data_dir, 1, EXPERTS | {"aux_loss": 0.1}, parallel={"recompute": recompute})
    assert pool.run(models_alive)[0] == before


def test_balancing_changes_gradients(one_rank: dict[float, list[dict[str, Any]]]) -> None:
    plain, balanced = one_rank[0.0], one_rank[0.1]
    assert plain[0]["loss"] == balanced[0]["loss"], "the balancing loss is no part of the reported one"
    assert plain[0]["grad_norm"] != balanced[0]["grad_norm"]
    assert plain[-1]["loss"] < plain[0]["loss"]


def values(layout: dict[str, Any], source: Path | None, target: Path | None) -> dict[str, float]:
    """Sum of |weight| by checkpoint key of this rank's slices, drawn anew or loaded; saved where `target` says."""
    model = tiny_model_config(moe=EXPERTS)
    ctx = enter_grid(ParallelConfig(**layout), torch.device("cpu"), seed=0)
    chunks = tiny_chunks(model, ctx, ParallelConfig(**layout))
    if source is None:
        initialise(chunks, model, 3, ctx)
    else:
        store.load(source, chunks, None, ctx)
    if target is not None:
        store.save(target, chunks, None, {"model": model.model_dump(mode="json"), "step": 0}, ctx)
    return {t.key: float(t.data.double().abs().sum()) for t in sharded_tensors(chunks, ctx) if "expert" in t.key or "router" in t.key}


def test_expert_ranks_hold_other_experts_of_one_model(pool: RankPool, tmp_path: Path) -> None:
    """Drawing, saving and loading give each expert the same numbers in any layout."""
    whole = pool.run(values, {}, None, tmp_path / "one")[0]
    assert sum(".experts.3.linear_fc2" in key for key in whole) == 3
    for layout, source, target in [({"expert": 2}, None, "two"), ({"expert": 2}, "one", None), ({}, "two", None)]:
        world_size = layout.get("expert", 1)
        ranks = pool.run(values, layout, source and tmp_path / source, target and tmp_path / target, world_size=world_size)
        assert {**ranks[0], **ranks[-1]} == whole
        assert len(ranks) == 1 or ranks[0].keys() != ranks[1].keys()


@pytest.mark.parametrize(("world_size", "zero"), [(2, 1), (4, 3)])
def test_resume_in_another_layout(
    world_size: int, zero: int, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[float, list[dict[str, Any]]]
) -> None:
    """Two steps with spread experts and a sharded optimizer, the third on one rank: weights and moments find their experts."""
    parallel = {"expert": 2, "zero": zero}
    train(pool, tmp_path, data_dir, world_size, EXPERTS | {"aux_loss": 0.0}, parallel=parallel, run={"max_steps": 2})
    records = train(pool, tmp_path, data_dir, 1, EXPERTS | {"aux_loss": 0.0})
    assert [r["step"] for r in records] == [r["step"] for r in one_rank[0.0]]
    assert records[-1]["loss"] == pytest.approx(one_rank[0.0][-1]["loss"], rel=1e-5)
    assert records[-1]["grad_norm"] == pytest.approx(one_rank[0.0][-1]["grad_norm"], rel=1e-4)


def bytes_of_experts(parallel: dict[str, Any]) -> tuple[int, int]:
    """(bytes of this rank's parts of expert weights, of all other weights) as they are trained."""
    from torch.distributed.tensor import DTensor

    from megavlm.training.build import wrap_for_training

    recipe = tiny_recipe("unused", "unused", model=tiny_model_config(moe=EXPERTS).model_dump(), parallel=parallel)
    ctx = enter_grid(recipe.parallel, torch.device("cpu"), seed=0)
    chunks = tiny_chunks(recipe.model, ctx, recipe.parallel)
    initialise(chunks, recipe.model, 3, ctx)
    held = [0, 0]
    for module in wrap_for_training(chunks, recipe, recipe.stages[0], recipe.parallel).modules:
        for name, parameter in module.named_parameters():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            held[".experts." not in name] += local.numel() * 4
    return held[0], held[1]


def test_shared_experts_are_split_over_the_ranks_that_hold_the_same_ones(pool: RankPool) -> None:
    """On four ranks two of which share experts: half of their own experts each, and a quarter of the rest; the planner says the same."""
    whole = pool.run(bytes_of_experts, {})[0]
    every = pool.run(bytes_of_experts, {"expert": 2, "zero": 3}, world_size=4)
    assert [sum(column) for column in zip(*every, strict=True)] == list(whole)
    assert max(experts for experts, _ in every) == whole[0] // 4
    model, parallel = tiny_model_config(moe=EXPERTS), ParallelConfig(expert=2, zero=3)
    stage, data = StageConfig(name="s", steps=1, packs_per_step=4, mixture={"a": 1.0}), DataConfig(seq_len_tokens=64)
    precision = PrecisionConfig(dtype="fp32")
    (said,) = estimate_memory(model, stage, data, RankGrid.from_config(parallel, 4), parallel, precision)
    # Norms and biases of a few numbers do not divide by four.
    assert said.parameters_bytes == pytest.approx(sum(every[0]), rel=0.05)
    assert 0 < said.gradients_bytes <= said.parameters_bytes and said.optimizer_bytes == 2 * said.gradients_bytes
