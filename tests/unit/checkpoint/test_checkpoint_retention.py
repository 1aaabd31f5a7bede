"""What is kept of a run's checkpoints."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint import folders, patience
from megavlm.checkpoint.retention import HELD_OUT_LOSS, Rules, prune, prune_local, reasons_to_keep, remove_strangers


def make(run: Path, name: str, **state: Any) -> Path:
    unfinished = run / "checkpoints" / (name + folders.UNFINISHED)
    unfinished.mkdir(parents=True)
    (unfinished / "shard").write_bytes(name.encode())
    folders.write_json(unfinished / folders.STATE, {"modules": {"language": name}, **state})
    folders.write_json(unfinished / folders.MANIFEST, {"files": {"shard": folders.checksum(unfinished / "shard")}})
    folders.publish(unfinished, run / "checkpoints" / name)
    return run / "checkpoints" / name


def left(run: Path) -> set[str]:
    return {p.name for p in (run / "checkpoints").iterdir() if p.is_dir()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step, stage, loss in [
        (1, "a", 1.0),
        (2, "a", 9.0),
        (3, "b", 5.0),
        (4, "b", 2.0),
        (5, "b", float("nan")),
        (6, "b", 3.0),
        (7, "b", None),
    ]:
        make(tmp_path, f"{step:08d}-{stage}", **{HELD_OUT_LOSS: loss})
    return tmp_path


def test_the_newest_the_last_of_each_stage_and_what_is_asked_for(run: Path) -> None:
    (run / "checkpoints" / "00000008-b.tmp").mkdir()
    gone = prune(run, Rules(keep_last=2, keep=frozenset({"00000003-b"})))
    assert left(run) == {"00000002-a", "00000003-b", "00000006-b", "00000007-b"}
    assert set(gone) == {"00000001-a", "00000004-b", "00000005-b", "00000008-b.tmp"}
    assert folders.newest(run) == run / "checkpoints" / "00000007-b"


def test_leftovers_may_be_those_of_a_save_under_way(run: Path) -> None:
    (run / "checkpoints" / "00000008-b.tmp").mkdir()
    prune(run, Rules(keep_last=1), leftovers=False)
    assert "00000008-b.tmp" in left(run)


def test_multiples_of_a_step(run: Path) -> None:
    prune(run, Rules(keep_last=1, keep_every_steps=3))
    assert left(run) == {"00000002-a", "00000003-b", "00000006-b", "00000007-b"}


def test_the_best_of_each_stage(run: Path) -> None:
    """A loss that is not a number is not the lowest; stages are not compared with one another."""
    prune(run, Rules(keep_last=1, keep_best=2))
    assert left(run) == {"00000001-a", "00000002-a", "00000004-b", "00000006-b", "00000007-b"}


def test_what_a_kept_one_needs_is_kept(tmp_path: Path) -> None:
    """The encoder of stage a is in an older checkpoint of stage a, which no other rule would keep."""
    make(tmp_path, "00000001-a", modules={"vision": "00000001-a"})
    make(tmp_path, "00000002-a", modules={"language": "00000002-a"})
    make(tmp_path, "00000003-b", modules={"vision": "00000001-a", "language": "00000003-b"})
    assert reasons_to_keep(tmp_path, Rules(keep_last=1))["00000001-a"] == ["holds vision of 00000003-b"]
    prune(tmp_path, Rules(keep_last=1))
    assert left(tmp_path) == {"00000001-a", "00000002-a", "00000003-b"}


def test_an_incomplete_one_is_neither_counted_nor_deleted(run: Path) -> None:
    (run / "checkpoints" / "00000007-b" / "shard").unlink()
    prune(run, Rules(keep_last=1))
    assert left(run) == {"00000002-a", "00000006-b", "00000007-b"}


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tidying up comes behind every save: what cannot be read is not tried for ten seconds each time."""

    def sleep(seconds: float) -> None:
        raise AssertionError(f"waited {seconds} s")

    monkeypatch.setattr(patience.time, "sleep", sleep)


def set_unreadable(path: Path) -> None:
    """Whoever reads its manifest gets EIO from the system, as from a process's memory where there is none."""
    (path / folders.MANIFEST).unlink()
    (path / folders.MANIFEST).symlink_to("/proc/self/mem")


def test_an_unreadable_one_stays_and_keeps_no_other_from_being_deleted(run: Path, no_waiting: None) -> None:
    set_unreadable(run / "checkpoints" / "00000001-a")
    set_unreadable(run / "checkpoints" / "00000006-b")
    assert set(prune(run, Rules(keep_last=2))) == {"00000003-b", "00000004-b"}
    assert left(run) == {"00000001-a", "00000002-a", "00000005-b", "00000006-b", "00000007-b"}, "it does not count as one of the newest"


def test_what_an_unreadable_one_may_need_is_kept(tmp_path: Path, no_waiting: None) -> None:
    make(tmp_path, "00000001-a", modules={"vision": "00000001-a"})
    make(tmp_path, "00000002-a", modules={"language": "00000002-a"})
    make(tmp_path, "00000003-b", modules={"vision": "00000001-a", "language": "00000003-b"})
    set_unreadable(make(tmp_path, "00000004-b", modules={"vision": "00000001-a", "language": "00000004-b"}))
    make(tmp_path, "00000005-b", modules={"vision": "00000005-b", "language": "00000005-b"})
    prune(tmp_path, Rules(keep_last=1))
    assert left(tmp_path) == {"00000001-a", "00000002-a", "00000004-b", "00000005-b"}


def test_an_unreadable_one_on_a_nodes_own_disk(run: Path, no_waiting: None) -> None:
    set_unreadable(run / "checkpoints" / "00000003-b")
    prune_local(run, 2, "00000006-b", "attempt")
    assert left(run) == {"00000003-b", "00000005-b", "00000006-b"}


def test_one_that_cannot_be_deleted_keeps_no_other_from_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = shutil.rmtree

    def rmtree(path: Path) -> None:
        if path.name.startswith("00000001-a"):
            raise OSError(errno.EIO, "Input/output error")
        remove(path)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for number in (8, 9):
        (run / "checkpoints" / f"{number:08d}-b.tmp").mkdir()
    for others in ({"00000008-b.tmp", "00000009-b.tmp"}, set()):  # it is a checkpoint, then a leftover
        with pytest.raises(OSError, match="Input/output"):
            prune(run, Rules(keep_last=1))
        assert {name for name in left(run) if not name.startswith("00000001-a")} == {"00000002-a", "00000007-b"} | others


@pytest.mark.parametrize("function", ["is_dir", "iterdir"])
def test_a_sick_disk_keeps_what_other_machines_left(
    function: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One node's disk must not end a start that the others wait for."""

    def fail(path: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, function, fail)
    remove_strangers(tmp_path, ["node"])
    assert f"{tmp_path} cannot be read (Input/output error): what other machines left there stays" in caplog.text
