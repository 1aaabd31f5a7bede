"""A disk or a file server that gives errors: a checkpoint that cannot be read is no damaged one. The errors are the system's own."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megavlm.checkpoint import folders, patience
from megavlm.checkpoint.errors import Unreadable
from megavlm.config.exits import Exit
from megavlm.config.schema import Recipe
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.tracker import Tracker

NEWEST = "00000003-all"


def make(run_dir: Path, data_dir: Path, **blocks: Any) -> Recipe:
    return tiny_recipe(run_dir, data_dir, [tiny_stage(steps=4)], checkpoint={"every_steps": 1, "keep_last": 10}, **blocks)


@pytest.fixture(scope="module")
def stopped(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("stopped")
    pool.run(train_and_read, make(run, data_dir, run={"max_steps": 3}), world_size=2)
    return run


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def set_unreadable(file: Path) -> Callable[[], None]:
    """Whoever reads the file gets EIO, as from a process's memory where there is none. Returns what mends it."""
    aside = file.with_name(f"aside-{file.name}")
    file.rename(aside)
    file.symlink_to("/proc/self/mem")

    def mend() -> None:
        aside.replace(file)

    return mend


def go_on(recipe: Recipe, pauses_s: tuple[float, ...]) -> tuple[str | None, int, list[str], list[str]]:
    """Train on; (the error, its exit code, incidents, messages)."""
    told: list[str] = []
    said: list[str] = []
    error, code = None, 0
    with (
        patch.object(patience, "PAUSES_S", pauses_s),
        patch.object(Tracker, "incident", lambda self, *what: told.append(f"{what[2]} [{what[0]}]")),
        patch.object(Tracker, "message", lambda self, text: said.append(text)),
    ):
        try:
            train_and_read(recipe)
        except ValueError as raised:
            error, code = str(raised), getattr(raised, "exit_code", Exit.USER)
    return error, code, told, [text for text in said if text.startswith("resuming")]


def test_a_server_that_blinks_costs_nothing(pool: RankPool, data_dir: Path, run: Path) -> None:
    """Ten milliseconds are tried for ten seconds."""
    mends = [set_unreadable(run / "checkpoints" / NEWEST / name) for name in (folders.STATE, ".metadata")]

    def later() -> None:
        time.sleep(1.0)
        for mend in mends:
            mend()

    thread = threading.Thread(target=later)
    thread.start()
    error, _, told, said = pool.run(go_on, make(run, data_dir), (0.01,) * 1000, world_size=2)[0]
    thread.join()
    assert (error, told) == (None, []) and len(said) == 1 and said[0].startswith("resuming at step 3,")


def test_what_cannot_be_read_is_passed_over_and_keeps_its_name(pool: RankPool, data_dir: Path, run: Path) -> None:
    mend = set_unreadable(run / "checkpoints" / NEWEST / folders.STATE)
    halfway = make(run, data_dir, run={"max_steps": 2})
    error, _, told, said = pool.run(go_on, halfway, (0.01,), world_size=2)[0]
    assert error is None and said[0].startswith("resuming at step 2,")
    assert len(told) == 1 and f"the checkpoint {NEWEST} cannot be read, and stays as it is" in told[0] and "Input/output error" in told[0]
    assert told[0].endswith("[unreadable_checkpoint]")
    assert "going on from 00000002-all instead" in told[0] and not list(run.glob("checkpoints/*.damaged"))
    mend()
    assert folders.problem(run / "checkpoints" / NEWEST) is None
    assert pool.run(go_on, make(run, data_dir), (0.01,), world_size=2)[0][3][0].startswith("resuming at step 3,"), "as good as it was"


def test_where_none_can_be_read_the_run_ends_and_may_be_started_again(pool: RankPool, data_dir: Path, run: Path) -> None:
    for path in folders.named(run):
        set_unreadable(path / folders.MANIFEST)
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    error, code, _, _ = pool.run(go_on, make(run, data_dir), (0.01,), world_size=2)[0]
    assert error is not None and "holds no checkpoint that can be read now" in error and NEWEST in error
    assert code == Exit.UNREADABLE and sorted(p.name for p in (run / "checkpoints").iterdir()) == before


def go_on_without_looking(recipe: Recipe) -> tuple[str | None, int, list[str], list[str]]:
    with patch.object(folders, "named", side_effect=Unreadable("the folder cannot be read")):
        return go_on(recipe, (0.01,))


def test_a_run_that_may_not_resume_says_on_every_rank_that_it_cannot_look(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, data_dir, [tiny_stage(steps=4)], checkpoint={"resume": False})
    for error, code, _, _ in pool.run(go_on_without_looking, recipe, world_size=2, timeout_s=60.0):
        assert (error, code) == ("the folder cannot be read", Exit.UNREADABLE)
