"""The folder of a run's checkpoints: what counts as complete, which is newest, what is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError


def make(run: Path, name: str, *, state: dict[str, Any] | None = None) -> Path:
    """A checkpoint with one shard."""
    unfinished = run / "checkpoints" / (name + folders.UNFINISHED)
    unfinished.mkdir(parents=True)
    (unfinished / "shard").write_bytes(name.encode() * 100)
    folders.write_json(unfinished / folders.STATE, state or {"step": int(name[:8])})
    folders.write_json(unfinished / folders.MANIFEST, {"files": {"shard": folders.checksum(unfinished / "shard")}})
    folders.publish(unfinished, run / "checkpoints" / name)
    return run / "checkpoints" / name


def test_newest_is_the_highest_complete_step(tmp_path: Path) -> None:
    assert folders.newest(tmp_path) is None
    older, newer = make(tmp_path, "00000009-align"), make(tmp_path, "00000010-tune")
    assert folders.newest(tmp_path) == newer
    assert (tmp_path / "checkpoints" / "latest").read_text() == "00000010-tune\n"
    (newer / folders.MANIFEST).unlink()
    assert folders.newest(tmp_path) == older


def test_at_one_step_latest_decides(tmp_path: Path) -> None:
    make(tmp_path, "00000010-z")
    last = make(tmp_path, "00000010-a")
    assert folders.newest(tmp_path) == last


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: (p / "shard").unlink(), "shard is missing"),
        (lambda p: (p / "shard").write_bytes(b"x"), "has 1 bytes instead of 1400"),
        (lambda p: (p / "state.json").unlink(), r"no state\.json.*interrupted"),
        (lambda p: (p / "manifest.json").unlink(), r"no manifest\.json.*interrupted"),
        (lambda p: (p / "state.json").write_text("{"), "damaged"),
        (lambda p: (p / "state.json").write_text("[]"), "damaged"),
        (lambda p: (p / "state.json").write_text('{"modules": null}'), "damaged"),
        (lambda p: (p / "manifest.json").write_text("[]"), "damaged"),
        (lambda p: p.rename(p.with_name("gone")), "no such folder"),
    ],
)
def test_incomplete_checkpoints_are_refused_and_passed_over(tmp_path: Path, damage: Any, message: str) -> None:
    path = make(tmp_path, "00000010-align")
    damage(path)
    assert folders.newest(tmp_path) is None
    with pytest.raises(CheckpointError, match=message):
        folders.read_state(path)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path = make(tmp_path, "00000010-align")
    folders.verify(path)
    data = bytearray((path / "shard").read_bytes())
    data[77] ^= 1
    (path / "shard").write_bytes(data)
    assert folders.problem(path) is None, "the size is right: only the checksum tells"
    with pytest.raises(CheckpointError, match="shard changed since it was written"):
        folders.verify(path)


def test_publishing_over_a_checkpoint_replaces_it_whole(tmp_path: Path) -> None:
    make(tmp_path, "00000010-align", state={"step": 1})
    path = make(tmp_path, "00000010-align", state={"step": 2})
    assert folders.read_state(path)["step"] == 2
    assert [p.name for p in path.parent.iterdir() if p.is_dir()] == ["00000010-align"]


def test_one_that_was_about_to_be_replaced_gets_its_name_back(tmp_path: Path) -> None:
    path = make(tmp_path, "00000010-align", state={"step": 1})
    path.rename(folders.aside(path))
    folders.recover(tmp_path)
    assert folders.read_state(path)["step"] == 1
    # Not where the newer one is there already, nor one that a deletion has begun to take apart.
    aside = make(tmp_path, "00000011-align").rename(folders.aside(path.with_name("00000011-align")))
    (aside / "shard").unlink()
    make(tmp_path, "00000012-align").rename(older := folders.aside(path.with_name("00000012-align")))
    make(tmp_path, "00000012-align", state={"step": 99})
    folders.recover(tmp_path)
    assert aside.is_dir() and older.is_dir() and not path.with_name("00000011-align").exists()
    assert folders.read_state(path.with_name("00000012-align"))["step"] == 99


def test_damaged_ones_are_set_aside_under_names_of_their_own(tmp_path: Path) -> None:
    first = folders.set_damaged_aside(make(tmp_path, "00000010-align"))
    second = folders.set_damaged_aside(make(tmp_path, "00000010-align"))
    assert first != second and first.is_dir() and second.is_dir()
    assert folders.named(tmp_path) == [] and not folders.is_leftover(first) and not folders.is_leftover(second)
