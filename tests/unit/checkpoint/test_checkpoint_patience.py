"""Reads that fail and reads that come back wrong once."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint import folders, listing, patience
from megavlm.checkpoint.errors import CheckpointError, Unreadable
from megavlm.config.exits import Exit
from megavlm_launchers.sbatch import FINAL


def make(run: Path, name: str = "00000010-align") -> Path:
    unfinished = run / "checkpoints" / (name + folders.UNFINISHED)
    unfinished.mkdir(parents=True)
    (unfinished / "shard").write_bytes(b"0123456789" * 100)
    folders.write_json(unfinished / folders.STATE, {"step": 10})
    folders.write_json(unfinished / folders.MANIFEST, {"files": {"shard": folders.checksum(unfinished / "shard")}})
    folders.publish(unfinished, run / "checkpoints" / name)
    return run / "checkpoints" / name


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES_S", (0.01, 0.01))


def test_an_error_of_the_disk_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """/proc/self/mem is a file of which the first byte cannot be read: EIO, from the system itself."""
    file = tmp_path / "file"
    file.symlink_to("/proc/self/mem")
    with pytest.raises(Unreadable, match="file cannot be read: Input/output error") as caught:
        patience.patiently(file.read_bytes, file)
    assert caught.value.exit_code == Exit.UNREADABLE and Exit.UNREADABLE not in FINAL, "a restart may find it well"
    assert caplog.text.count("tried again") == 2

    def mend() -> None:
        time.sleep(0.2)
        (tmp_path / "other").write_bytes(b"well")
        (tmp_path / "other").replace(file)

    monkeypatch.setattr(patience, "PAUSES_S", (0.01,) * 1000)
    thread = threading.Thread(target=mend)
    thread.start()
    assert patience.patiently(file.read_bytes, file) == b"well"
    thread.join()


def test_a_file_that_is_missing_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "PAUSES_S", (3600.0,))
    with pytest.raises(FileNotFoundError):
        patience.patiently((tmp_path / "none").read_bytes, "it")
    with pytest.raises(Unreadable, match="Is a directory"):
        patience.patiently(tmp_path.read_bytes, "it")


def test_a_state_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    path = make(tmp_path)
    (path / folders.STATE).unlink()
    (path / folders.STATE).symlink_to("/proc/self/mem")
    with pytest.raises(Unreadable):
        folders.read_state(path)
    (entry,) = listing.survey(tmp_path)
    assert entry.problem is not None and "cannot be read" in entry.problem
    assert "damaged" not in " ".join(listing.damage(path))


def test_who_lists_checkpoints_waits_for_no_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, sick = make(tmp_path, "00000010-align"), make(tmp_path, "00000020-align")
    (sick / folders.STATE).unlink()
    (sick / folders.STATE).symlink_to("/proc/self/mem")
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: pytest.fail(f"waited {seconds} s"))
    assert [(e.name, e.problem is None, e.resumes) for e in listing.survey(tmp_path)] == [
        (good.name, True, True),
        (sick.name, False, False),
    ]


def test_a_leftover_that_cannot_be_read_stops_no_start(tmp_path: Path) -> None:
    one, two = make(tmp_path, "00000010-align"), make(tmp_path, "00000020-align")
    one, two = (path.rename(folders.aside(path)) for path in (one, two))
    (one / folders.MANIFEST).unlink()
    (one / folders.MANIFEST).symlink_to("/proc/self/mem")
    folders.recover(tmp_path)
    assert one.is_dir() and [path.name for path in folders.named(tmp_path)] == ["00000020-align"], "the other one has its name back"


def test_a_checksum_is_wrong_when_it_is_wrong_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path)
    digest, sums = folders._digest, []

    def wrong_once(*arguments: Any) -> str:
        sums.append(digest(*arguments))
        return "0" * 32 if len(sums) == 1 else sums[-1]

    monkeypatch.setattr(folders, "_digest", wrong_once)
    with caplog.at_level(logging.WARNING):
        folders.verify(path)
    assert len(sums) == 2 and "was read wrongly once" in caplog.text
    (path / "shard").write_bytes(b"0123456780" * 100)
    with pytest.raises(CheckpointError, match="shard changed") as caught:
        folders.verify(path)
    assert not isinstance(caught.value, Unreadable) and len(sums) == 4
