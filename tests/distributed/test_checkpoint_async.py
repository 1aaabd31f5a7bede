"""Saving beside training: what is saved is the state of its step, training goes on, and nothing is lost or left when a save fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megavlm.checkpoint import folders, saver
from megavlm.checkpoint.errors import DiskFull, SaveFailed
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.checkpoint.resume import RUN_ID
from megavlm.config.exits import Exit
from megavlm.config.schema import Recipe
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankError, RankPool
from megavlm.testing.recipes import assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.tracker import Tracker
from megavlm.training.run import train
from megavlm_launchers.sbatch import FINAL

LAYOUTS: dict[str, tuple[dict[str, Any], int]] = {
    "one": ({}, 1),
    "DP2 ZeRO-1": ({"zero": 1}, 2),
    "TP2": ({"tensor": 2, "sequence": True}, 2),
    "PP2": ({"pipeline": 2}, 2),
    "DP2 ZeRO-3": ({"zero": 3}, 2),
    "CP2 ZeRO-1": ({"context": 2, "zero": 1}, 2),
    "TP2 x DP2 ZeRO-1 overlapped": (
        {"tensor": 2, "zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True},
        4,
    ),
}


def make(run_dir: Path, data_dir: Path, steps: int = 4, **blocks: Any) -> Recipe:
    blocks.setdefault("checkpoint", {"every_steps": 1, "keep_last": 10})
    return tiny_recipe(run_dir, data_dir, [tiny_stage(steps=steps)], **blocks)


@contextmanager
def slow_writes(seconds: float) -> Iterator[None]:
    original = saver._write_file

    def write(*arguments: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments)

    with patch.object(saver, "_write_file", write):
        yield


def train_slowly(recipe: Recipe, seconds: float) -> tuple[list[dict[str, Any]], list[str]]:
    """Train with a disk that needs so long for a file; the run's metrics, and what it said."""
    said: list[str] = []
    with slow_writes(seconds), patch.object(Tracker, "message", lambda self, text: said.append(text)):
        return train_and_read(recipe), said


def contents(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder)
    return {key: reader.tensor(key) for key in reader.entries}


def names(run_dir: Path) -> list[str]:
    return [p.name for p in folders.named(run_dir)]


@pytest.mark.parametrize("layout", slow_unless(LAYOUTS, lambda layout: layout == "DP2 ZeRO-1"))
def test_a_save_is_the_state_of_its_step(layout: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """The same bytes as where training waits for every save, though here it goes on while the disk is slow."""
    parallel, world_size = LAYOUTS[layout]
    waits = make(tmp_path / "waits", data_dir, parallel=parallel, checkpoint={"every_steps": 1, "keep_last": 10, "asynchronous": False})
    goes_on = make(tmp_path / "goes on", data_dir, parallel=parallel)
    expected = pool.run(train_and_read, waits, world_size=world_size)[0]
    records, said = pool.run(train_slowly, goes_on, 0.3, world_size=world_size)[0]
    assert [r["loss"] for r in records] == [r["loss"] for r in expected]
    assert any("for the save before it" in text for text in said), "a save that is due while one is under way waits, and says so"
    assert names(tmp_path / "goes on") == names(tmp_path / "waits") == [f"{step:08d}-all" for step in (1, 2, 3, 4)]
    for name in names(tmp_path / "waits"):
        one, other = (contents(tmp_path / run / "checkpoints" / name) for run in ("waits", "goes on"))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), name


def train_and_note(recipe: Recipe) -> list[str]:
    """What happened in which order, with a disk that needs seconds for a file."""
    events: list[str] = []
    original = Tracker.step

    def step(self: Tracker, record: Any) -> None:
        events.append(f"step {record['step']}")
        original(self, record)

    said = patch.object(Tracker, "message", lambda self, text: events.append(text.split(" in ")[0]))
    with slow_writes(2.0), patch.object(Tracker, "step", step), said:
        train_and_read(recipe)
    return [event for event in events if event.startswith(("step", "saved"))]


def test_training_goes_on_while_a_save_is_under_way(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    events = pool.run(train_and_note, make(tmp_path, data_dir, steps=6, checkpoint={"every_steps": 4}), world_size=2)[0]
    assert events == [*(f"step {n}" for n in range(1, 7)), "saved 00000004-all", "saved 00000006-all"]


@pytest.mark.parametrize("source, target", [("DP2 ZeRO-1", "TP2"), ("DP2 ZeRO-3", "PP2"), ("TP2", "DP2 ZeRO-3"), ("PP2", "CP2 ZeRO-1")])
@pytest.mark.slow
def test_what_was_saved_beside_training_loads_into_other_layouts(
    source: str, target: str, pool: RankPool, data_dir: Path, tmp_path: Path
) -> None:
    expected = pool.run(train_and_read, make(tmp_path / "whole", data_dir))[0]
    (one, ranks), (two, others) = LAYOUTS[source], LAYOUTS[target]
    pool.run(train_and_read, make(tmp_path / "run", data_dir, parallel=one, run={"max_steps": 3}), world_size=ranks)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "00000003-all")
    folders.write_bytes(tmp_path / "run" / "checkpoints" / "latest", b"00000002-all\n")
    records = pool.run(train_and_read, make(tmp_path / "run", data_dir, parallel=two), world_size=others)[0]
    assert_same_records(records, expected)


# ------------------------------------------------------------------------------------------------------ full disks


def train_on_a_full_disk(recipe: Recipe, full_at: tuple[int, ...], failing_rank: int) -> tuple[int, list[str]]:
    """One rank finds no room for the checkpoints of these steps. Returns the last step, and the incidents."""
    original, told = saver._write_file, []

    def write(file: Path, memory: torch.Tensor, job: Any) -> Any:
        if int(file.parent.name[:8]) in full_at and int(os.environ["RANK"]) == failing_rank:
            file.write_bytes(b"a part of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(file, memory, job)

    with patch.object(saver, "_write_file", write), patch.object(Tracker, "incident", lambda self, *what: told.append(what[2])):
        records = train_and_read(recipe)
    return records[-1]["step"], told


def test_a_full_disk_by_policy(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    keeps = {"every_steps": 1, "keep_last": 10}
    run, recipe = tmp_path / "goes on", make(tmp_path / "goes on", data_dir, checkpoint=keeps | {"on_disk_full": "continue"})
    last, told = pool.run(train_on_a_full_disk, recipe, (2,), 1, world_size=2)[0]
    assert last == 4 and len(told) == 1 and "rank 1 could not write" in told[0] and "goes on without this checkpoint" in told[0]
    assert names(run) == [f"{step:08d}-all" for step in (1, 3, 4)]
    assert {p.name for p in (run / "checkpoints").iterdir()} == {*names(run), "latest", RUN_ID}, "parts of the one that failed are gone"

    run, recipe = tmp_path / "ends", make(tmp_path / "ends", data_dir, checkpoint=keeps)
    with pytest.raises(RankError, match="DiskFull: saving .*00000002-all: rank 1 could not write: .*No space left"):
        pool.run(train_on_a_full_disk, recipe, (2,), 1, world_size=2)
    assert names(run) == ["00000001-all"] and folders.latest(run) == "00000001-all"


def test_the_last_save_cannot_be_left_out(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, data_dir, checkpoint={"every_steps": 3, "on_disk_full": "continue"})
    with pytest.raises(RankError, match="DiskFull: .*00000004-all.*make room, and start again"):
        pool.run(train_on_a_full_disk, recipe, (4,), 0)
    assert names(tmp_path) == ["00000003-all"]


def train_with_a_disk(recipe: Recipe, prunes: BaseException | None, writes: BaseException | None) -> int:
    """The disk fails whoever deletes old checkpoints, or whoever writes. Returns the last step."""
    original = saver._write_file

    def write(*arguments: Any) -> Any:
        if writes is not None:
            raise writes
        return original(*arguments)

    with patch("megavlm.training.checkpointing.prune", side_effect=prunes), patch.object(saver, "_write_file", write):
        return int(train_and_read(recipe)[-1]["step"])


@pytest.mark.parametrize("error", [OSError(errno.ENOTEMPTY, "Directory not empty"), AttributeError("a fault of the program")], ids=repr)
def test_a_checkpoint_is_good_though_older_ones_cannot_be_deleted(error: Exception, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, data_dir, checkpoint={"every_steps": 1, "keep_last": 1})
    assert pool.run(train_with_a_disk, recipe, error, None)[0] == 4
    assert names(tmp_path) == [f"{step:08d}-all" for step in (1, 2, 3, 4)] and folders.latest(tmp_path) == "00000004-all"


def train_where_deleting_hangs(recipe: Recipe) -> None:
    with patch("megavlm.training.checkpointing.prune", lambda *_: time.sleep(600)):
        train(recipe)


def test_deleting_older_ones_has_a_time_limit_of_its_own(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = make(tmp_path, data_dir, checkpoint={"every_steps": 1, "timeout_s": 2.0})
    with pytest.raises(RankError, match="rank 0 died"):
        pool.run(train_where_deleting_hangs, recipe, timeout_s=60.0)
    assert "tidying up behind" in (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert names(tmp_path) == ["00000001-all"] and folders.latest(tmp_path) == "00000001-all"


def test_a_disk_that_fails_ends_the_run_as_what_a_restart_may_mend(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="SaveFailed: saving .*00000001-all: rank 0 could not write: .*Stale file handle"):
        pool.run(train_with_a_disk, make(tmp_path, data_dir), None, OSError(errno.ESTALE, "Stale file handle"))
    assert SaveFailed.exit_code == Exit.SAVE_FAILED and Exit.SAVE_FAILED not in FINAL and DiskFull.exit_code in FINAL


def stop_on_a_full_disk(recipe: Recipe) -> tuple[int, list[str]]:
    """A signal comes in step 2, and there is no room for its checkpoint. Returns the exit code, and what was said."""
    said: list[str] = []
    step, write = Tracker.step, saver._write_file

    def and_stop(self: Tracker, record: dict[str, Any]) -> None:
        step(self, record)
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGUSR2)

    def and_fail(file: Path, *rest: Any) -> Any:
        if file.parent.name.startswith("00000002-all"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, *rest)

    with (
        patch.object(Tracker, "step", and_stop),
        patch.object(saver, "_write_file", and_fail),
        patch.object(Tracker, "message", lambda self, text: said.append(text)),
        patch.object(Tracker, "incident", lambda self, *what: said.append(what[2])),
    ):
        return train(recipe), said


@pytest.mark.parametrize("every_steps, newest", [(1, "00000001-all"), (10, "the beginning")])
def test_without_room_a_signal_stops_by_policy(every_steps: int, newest: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    goes_on = {"every_steps": every_steps, "on_disk_full": "continue"}
    code, said = pool.run(stop_on_a_full_disk, make(tmp_path / "goes on", data_dir, checkpoint=goes_on))[0]
    assert code == 128 + signal.SIGUSR2
    assert f"signal 12: could not save step 2, leaving; the next start goes on from {newest}" in said
    assert any(text.endswith("No space left on device; the run stops without this checkpoint") for text in said)
    with pytest.raises(RankError, match="DiskFull"):
        pool.run(stop_on_a_full_disk, make(tmp_path / "ends", data_dir, checkpoint={"every_steps": 10}))


# ----------------------------------------------------------------------------------------------- damaged checkpoints


def train_and_listen(recipe: Recipe) -> tuple[list[dict[str, Any]], list[str]]:
    told: list[str] = []
    with patch.object(Tracker, "incident", lambda self, *what: told.append(what[2])):
        return train_and_read(recipe), told


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def shard(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda p: p.stat().st_size)


DAMAGE = {
    "a bit flipped": lambda folder: flip(shard(folder)),
    "a shard cut off": lambda folder: os.truncate(shard(folder), 1000),
    "a shard gone": lambda folder: shard(folder).unlink(),
    "the index gone": lambda folder: (folder / ".metadata").unlink(),
    "the state changed": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": 3', '"step": 2')
    ),
    "the manifest gone": lambda folder: (folder / "manifest.json").unlink(),
    "all of it gone": shutil.rmtree,
}


@pytest.fixture(scope="module")
def stopped(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run that stopped after three of four steps, and the records of one that did not."""
    run = tmp_path_factory.mktemp("stopped")
    pool.run(train_and_read, make(run, data_dir, run={"max_steps": 3}), world_size=2)
    return run, pool.run(train_and_read, make(tmp_path_factory.mktemp("whole"), data_dir), world_size=2)[0]


@pytest.mark.parametrize("damage", slow_unless(DAMAGE, lambda damage: damage in ("a bit flipped", "all of it gone")))
def test_a_damaged_newest_one_gives_way_loudly(
    damage: str, pool: RankPool, data_dir: Path, tmp_path: Path, stopped: tuple[Path, list[dict[str, Any]]]
) -> None:
    source, expected = stopped
    run = tmp_path / "run"
    shutil.copytree(source, run)
    DAMAGE[damage](run / "checkpoints" / "00000003-all")
    assert folders.latest(run) == "00000003-all"
    records, told = pool.run(train_and_listen, make(run, data_dir), world_size=2)[0]
    assert len(told) == 1 and "00000003-all" in told[0] and "going on from 00000002-all" in told[0]
    assert [r["loss"] for r in records] == [r["loss"] for r in expected]
    assert folders.latest(run) == "00000004-all"
    assert damage == "all of it gone" or (run / "checkpoints" / "00000003-all.damaged").is_dir(), "kept for whoever wants to know"


def test_without_a_good_one_a_run_does_not_begin_anew(
    pool: RankPool, data_dir: Path, tmp_path: Path, stopped: tuple[Path, list[dict[str, Any]]]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(stopped[0], run)
    for folder in folders.named(run):
        flip(shard(folder))
    before = sorted(p.name for p in (run / "checkpoints").iterdir())
    with pytest.raises(RankError, match="holds no good checkpoint to go on from: .*00000003-all.*00000001-all"):
        pool.run(train_and_read, make(run, data_dir), world_size=2)
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == before
    shutil.rmtree(run / "checkpoints" / "00000001-all"), shutil.rmtree(run / "checkpoints" / "00000002-all")
    shutil.rmtree(run / "checkpoints" / "00000003-all")
    with pytest.raises(RankError, match="the newest checkpoint, 00000003-all, is gone"):
        pool.run(train_and_read, make(run, data_dir), world_size=2)


# --------------------------------------------------------------------------------------------------------- retention


def test_the_best_by_held_out_loss_are_kept(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Measured before each save, though every_steps of the evaluation is another one."""
    recipe = make(
        tmp_path,
        data_dir,
        evaluation={"sources": ["held_out"], "every_steps": 3, "packs": 2},
        checkpoint={"every_steps": 1, "keep_last": 1, "keep_best": 1},
    )
    pool.run(train_and_read, recipe)
    lines = [json.loads(line) for line in (tmp_path / "evaluation.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines}
    assert sorted(losses) == [1, 2, 3, 4]
    best = min(losses, key=lambda step: losses[step])
    assert names(tmp_path) == sorted({f"{best:08d}-all", "00000004-all"})
    assert folders.read_state(tmp_path / "checkpoints" / f"{best:08d}-all")["held_out_loss"] == losses[best]
