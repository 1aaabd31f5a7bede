"""What is kept of a run's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint import folders
from megavlm.checkpoint.retention import HELD_OUT_LOSS, Rules, prune, reasons_to_keep


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
