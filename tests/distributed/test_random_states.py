"""What a module of one's own draws goes on after a resume as if nothing had happened."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megavlm.checkpoint import random_states, saver
from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.config.schema import Recipe
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.tracker import Tracker


def draws() -> dict[str, Any]:
    """Of each generator; one Gaussian, since the second is kept for the next call. On a CPU nothing draws from megatron-core's own."""
    return {
        "python": (random.random(), random.gauss(0, 1)),
        "numpy": (np.random.rand(), np.random.randn()),  # noqa: NPY002
        "dropout": torch.nn.functional.dropout(torch.ones(64), 0.5).tolist(),
        "megatron": {name: state.sum().item() for name, state in get_cuda_rng_tracker().get_states().items()},
    }


def train_and_draw(recipe: Recipe) -> dict[int, dict[str, Any]]:
    """Step -> what was drawn in it."""
    found: dict[int, dict[str, Any]] = {}
    original = Tracker.step

    def step(self: Tracker, record: Any) -> None:
        found[record["step"]] = draws()
        original(self, record)

    random.seed(), np.random.seed()  # noqa: NPY002  # no two processes are alike
    with patch.object(Tracker, "step", step):
        train_and_read(recipe)
    return found


def make(run_dir: Path, data_dir: Path, **blocks: Any) -> Recipe:
    return tiny_recipe(run_dir, data_dir, [tiny_stage(steps=4)], **blocks)


@pytest.fixture(scope="module")
def stopped(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[int, dict[str, Any]]]]:
    """A run that stopped after two of four steps on two data ranks, and what one that did not stop drew on each."""
    run = tmp_path_factory.mktemp("stopped")
    pool.run(train_and_draw, make(run, data_dir, run={"max_steps": 2}), world_size=2)
    return run, pool.run(train_and_draw, make(tmp_path_factory.mktemp("whole"), data_dir), world_size=2)


def go_on(pool: RankPool, stopped: Path, run: Path, data_dir: Path, **blocks: Any) -> list[dict[int, dict[str, Any]]]:
    shutil.copytree(stopped, run)
    return pool.run(train_and_draw, make(run, data_dir, **blocks), world_size=2)


def test_the_same_layout_draws_what_an_uninterrupted_run_draws(
    pool: RankPool, data_dir: Path, tmp_path: Path, stopped: tuple[Path, list[dict[int, dict[str, Any]]]]
) -> None:
    run, whole = stopped
    resumed = go_on(pool, run, tmp_path / "run", data_dir)
    for rank in (0, 1):
        assert resumed[rank] == {step: whole[rank][step] for step in (3, 4)}
    assert all(whole[0][3][name] != whole[1][3][name] for name in whole[0][3]), "data ranks draw their own"


def test_another_layout_draws_anew_and_again_the_same(
    pool: RankPool, data_dir: Path, tmp_path: Path, stopped: tuple[Path, list[dict[int, dict[str, Any]]]]
) -> None:
    run, whole = stopped
    one, two = (go_on(pool, run, tmp_path / name, data_dir, parallel={"tensor": 2}) for name in ("one", "two"))
    assert one == two
    assert all(one[0][3][name] != whole[0][step][name] for name in whole[0][3] for step in whole[0])
    assert one[0][3]["dropout"] == one[1][3]["dropout"] and one[0][3]["megatron"] != one[1][3]["megatron"]


def stop_elsewhere(recipe: Recipe, what: str) -> None:
    """Train where rank 1 has other generators, or all another device, than where the run goes on."""
    captured, grid_of = random_states._captured, random_states.grid_of

    def capture(ctx: Any) -> dict[str, Any]:
        found = captured(ctx)
        name = next(name for name in found if name.startswith("megatron."))
        if ctx.rank == 1 and what == "without one":
            del found[name]
        if ctx.rank == 1 and what == "of another size":
            found[name] = np.append(found[name], np.zeros(8, dtype=np.uint8))
        return found

    def elsewhere(ctx: Any) -> list[int | str]:
        return [*grid_of(ctx)[:-1], "cuda"] if what == "on a GPU" else grid_of(ctx)

    with patch.object(random_states, "_captured", capture), patch.object(saver, "grid_of", elsewhere):
        train_and_read(recipe)


@pytest.mark.parametrize("what", slow_unless(["without one", "of another size", "on a GPU"], lambda what: what == "without one"))
def test_states_of_other_generators_are_seeded_anew_on_all_ranks(
    what: str, pool: RankPool, data_dir: Path, tmp_path: Path, stopped: tuple[Path, list[dict[int, dict[str, Any]]]]
) -> None:
    """A good checkpoint stays one: of another device, or of another version of megatron-core or torch."""
    pool.run(stop_elsewhere, make(tmp_path / "saved", data_dir, run={"max_steps": 2}), what, world_size=2)
    resumed = go_on(pool, tmp_path / "saved", tmp_path / "run", data_dir)
    for rank in (0, 1):  # though rank 0's states are its own
        assert all(resumed[rank][3][name] != stopped[1][rank][3][name] for name in resumed[rank][3])


def restore_damaged(folder: Path) -> str:
    from megavlm.parallel.context import enter_grid

    recipe = tiny_recipe(folder, folder)
    ctx = enter_grid(recipe.parallel, torch.device("cpu"), 1)
    with patch.object(CheckpointReader, "tensor", lambda self, key: torch.zeros(64, dtype=torch.uint8)):
        try:
            random_states.restore(folder, ctx)
        except CheckpointError as error:
            return str(error)
    return ""


def test_damaged_states_are_one_clear_error(
    pool: RankPool, data_dir: Path, tmp_path: Path, stopped: tuple[Path, list[dict[int, dict[str, Any]]]]
) -> None:
    folder = stopped[0] / "checkpoints" / "00000002-all"
    assert "the random states of rank 0 cannot be read" in pool.run(restore_damaged, folder, world_size=2)[0]
