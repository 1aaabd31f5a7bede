"""The loss is the weighted mean over the targets of the whole global batch, whatever the weights and the layout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read

WEIGHTED = {"loss": {"averaging": "square", "task_weights": {"reading": 2.0, "caption": 0.25}}}


def against_autograd(run_dir: Path, data_dir: Path, factor: float) -> tuple[float, float, float, float]:
    """One step with random weights x factor, some 0: (our loss, sum(w x loss) / sum(w), largest gradient, largest difference of one)."""
    from megavlm.models.init import initialise
    from megavlm.parallel.context import enter_grid
    from megavlm.training.build import build_chunks, wrap_for_training
    from megavlm.training.data import RunData
    from megavlm.training.state import RunState
    from megavlm.training.step import forward_backward

    recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=1)])
    stage = recipe.stages[0]
    ctx = enter_grid(recipe.parallel, torch.device("cpu"), 1)
    modules = build_chunks(recipe, stage, recipe.parallel, ctx)
    initialise(modules, recipe.model, 1, ctx)
    model = wrap_for_training(modules, recipe, stage, recipe.parallel)
    stream = RunData(recipe).open_stage(stage, ctx, RunState())
    generator = torch.Generator().manual_seed(3)
    batches = []
    for batch in stream.next().microbatches:
        weights = torch.rand(batch.target_ids_Q.shape, generator=generator)
        batches.append(replace(batch, target_weights_Q=torch.where(weights < 0.3, 0.0, weights * factor)))
    stream.close()

    total, weight = torch.zeros(()), 0.0
    for batch in batches:
        per_target = modules[0](batch)
        total = total + per_target.total
        weight += float(batch.target_weights_Q.sum())
    expected = total / weight
    named = [(n, p) for n, p in modules[0].named_parameters() if p.requires_grad]
    wanted = dict(zip((n for n, _ in named), torch.autograd.grad(expected, [p for _, p in named], allow_unused=True), strict=True))

    model.chunks[0].zero_grad_buffer()
    loss = forward_backward(model.chunks, batches, stream.tasks, ctx)
    gradients = [(p.main_grad, wanted[n]) for n, p in named if wanted[n] is not None]  # type: ignore[attr-defined]
    largest = max(float(mine.abs().max()) for mine, _ in gradients)
    return loss.loss, float(expected), largest, max(float((mine - theirs).abs().max()) for mine, theirs in gradients)


@pytest.mark.parametrize("factor", [1.0, 0.01])
def test_loss_and_gradients_are_of_the_weighted_mean(pool: RankPool, tmp_path: Path, data_dir: Path, factor: float) -> None:
    loss, expected, largest, difference = pool.run(against_autograd, tmp_path / "run", data_dir, factor)[0]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert largest > 1e-3 and difference < 1e-5 * max(1.0, largest)


@pytest.fixture(scope="module")
def single(pool: RankPool, tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> list[dict[str, Any]]:
    return train(pool, tmp_path_factory.mktemp("single"), data_dir, 1, {}, WEIGHTED)


def train(
    pool: RankPool, run_dir: Path, data_dir: Path, ranks: int, parallel: dict[str, Any], changes: dict[str, Any]
) -> list[dict[str, Any]]:
    recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=3, **changes)], parallel=parallel)
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=ranks)[0]
    return records


@pytest.mark.parametrize(
    ("ranks", "parallel"), [(2, {}), (2, {"context": 2}), (4, {"tensor": 2, "pipeline": 2})], ids=["DP2", "CP2", "TP2xPP2"]
)
def test_weighted_layouts_equal_a_single_rank(
    pool: RankPool, tmp_path: Path, data_dir: Path, single: list[dict[str, Any]], ranks: int, parallel: dict[str, Any]
) -> None:
    records = train(pool, tmp_path, data_dir, ranks, parallel, WEIGHTED)
    assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in single], rel=1e-5)
    assert [r["grad_norm"] for r in records] == pytest.approx([r["grad_norm"] for r in single], rel=1e-4)


def test_weights_matter(pool: RankPool, tmp_path: Path, data_dir: Path, single: list[dict[str, Any]]) -> None:
    plain = train(pool, tmp_path, data_dir, 1, {}, {})
    assert abs(plain[0]["loss"] - single[0]["loss"]) > 1e-3
