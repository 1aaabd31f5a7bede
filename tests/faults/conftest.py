"""What the fault matrix shares: an uninterrupted run, a run that stopped in the middle, and the file of measured figures."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.matrix.faults import SAVE_EVERY, recipe_of
from megavlm.testing.matrix.table import Figures
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import train_and_read


@pytest.fixture(scope="session")
def uninterrupted(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of a run that nothing happened to."""
    recipe = recipe_of(tmp_path_factory.mktemp("uninterrupted"), data_dir)
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=2, timeout_s=300)[0]
    return records


@pytest.fixture(scope="session")
def stopped(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that ended at its second checkpoint, and goes on from there when it is started."""
    folder = tmp_path_factory.mktemp("stopped")
    recipe = recipe_of(folder, data_dir, run={"max_steps": 2 * SAVE_EVERY})
    pool.run(train_and_read, recipe, world_size=2, timeout_s=300)
    return folder


@pytest.fixture(scope="session")
def figures() -> Iterator[Figures]:
    """Fault -> what was measured; written to $MEGAVLM_FAULTS_RESULTS."""
    found: Figures = {}
    yield found
    target = os.environ.get("MEGAVLM_FAULTS_RESULTS")
    if target and found:
        Path(target).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
