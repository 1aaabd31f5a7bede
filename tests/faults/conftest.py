"""What the fault matrix shares: uninterrupted runs, and a run that stopped in the middle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.matrix.faults import LONG, SAVE_EVERY, recipe_of
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import train_and_read

STEPS_A_FAULT = 16
"""More than the long run makes between one fault and the next."""


@pytest.fixture(scope="session")
def uninterrupted(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of a run that nothing happened to."""
    recipe = recipe_of(tmp_path_factory.mktemp("uninterrupted"), data_dir)
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=2, timeout_s=300)[0]
    return records


@pytest.fixture(scope="session")
def long_uninterrupted(
    request: pytest.FixtureRequest, pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[int], list[dict[str, Any]]]:
    """Number of steps -> metrics of that many steps of the long run, which nothing happened to; it is made anew, and longer, when it is
    too short for what the long run has done."""
    kept: list[dict[str, Any]] = []
    expected = STEPS_A_FAULT * sum("long_run" in getattr(item, "fixturenames", ()) for item in request.session.items)

    def first(steps: int) -> list[dict[str, Any]]:
        if len(kept) < steps:
            recipe = recipe_of(
                tmp_path_factory.mktemp("long-uninterrupted"), data_dir, LONG, run={"max_steps": min(max(2 * steps, expected), LONG)}
            )
            kept[:] = pool.run(train_and_read, recipe, world_size=2, timeout_s=300)[0]
        return kept[:steps]

    return first


@pytest.fixture(scope="session")
def stopped(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended at its second checkpoint, and goes on from there when it is started."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = recipe_of(folder, data_dir, run={"max_steps": 2 * SAVE_EVERY})
    pool.run(train_and_read, recipe, world_size=2, timeout_s=300)
    return folder
