"""Conversions are killed, find the disk full, and go on: the bytes are those of one that went through."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError, HuggingFaceError
from megavlm.checkpoint.hf import export_hf
from megavlm.checkpoint.hf import weight_files as exporting
from megavlm.checkpoint.hf.importing import import_hf
from megavlm.checkpoint.journal import Journal
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.checkpoint.writer import CheckpointWriter
from megavlm.testing.families import CASES
from megavlm.testing.families.case import make_hf

IMPORT, EXPORT = "import", "export"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "hf"
    make_hf(CASES[0], path, max_shard_size=100_000)
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    import_hf(folder, folder.parent / "checkpoint")
    return folder.parent / "checkpoint"


@pytest.fixture(autouse=True)
def sync_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor is written down, and a file of an import holds few."""
    original = CheckpointWriter.__init__
    monkeypatch.setattr(CheckpointWriter, "__init__", lambda self, path, job: original(self, path, job, file_bytes=100_000, sync_bytes=1))
    monkeypatch.setattr(exporting, "_SYNC_BYTES", 1)
    monkeypatch.setattr(exporting.write_weights, "__kwdefaults__", {"sync_bytes": 1, "label": "export"})


def run(kind: str, folder: Path, checkpoint: Path, target: Path) -> None:
    if kind == IMPORT:
        import_hf(folder, target)
    else:
        export_hf(checkpoint, target, max_shard_bytes=60_000)


def contents(path: Path) -> dict[str, bytes]:
    """Files but state.json, whose module names are the folder's."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != "state.json"}


def failing(monkeypatch: pytest.MonkeyPatch, after: int, error: Exception) -> Callable[[], None]:
    """Make the write of tensor number `after` fail; call what is returned to mend it."""
    count = 0
    saved, written = torch.save, exporting._Files.write

    def check() -> None:
        nonlocal count
        count += 1
        if count > after:
            raise error

    monkeypatch.setattr(torch, "save", lambda *a, **k: (check(), saved(*a, **k))[1])
    monkeypatch.setattr(exporting._Files, "write", lambda self, tensor: (check(), written(self, tensor))[1])

    def mend() -> None:
        monkeypatch.setattr(torch, "save", saved)
        monkeypatch.setattr(exporting._Files, "write", written)

    return mend


@pytest.mark.parametrize("after", [1, 20, 60])
@pytest.mark.parametrize("kind", [IMPORT, EXPORT])
def test_a_full_disk_loses_nothing(
    kind: str, after: int, folder: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(kind, folder, checkpoint, tmp_path / "through")
    mend = failing(monkeypatch, after, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError, match="No space left"):
        run(kind, folder, checkpoint, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    mend()
    entries = (tmp_path / "again.tmp" / "journal.jsonl").read_text().splitlines()
    assert len(entries) > after // 3, "what was written before the disk was full is kept"
    run(kind, folder, checkpoint, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tmp_path / "through")
    assert not (tmp_path / "again.tmp").exists()


KILLED = """
import sys, time
from pathlib import Path
from megavlm.checkpoint.writer import CheckpointWriter
from megavlm.checkpoint.hf import weight_files
from megavlm.checkpoint.hf import export_hf
from megavlm.checkpoint.hf.importing import import_hf
first = CheckpointWriter.__init__
CheckpointWriter.__init__ = lambda self, path, job: first(self, path, job, file_bytes=100_000, sync_bytes=1)
weight_files.write_weights.__kwdefaults__["sync_bytes"] = 1
add, write = CheckpointWriter.add, weight_files._Files.write
CheckpointWriter.add = lambda self, *a: (add(self, *a), time.sleep(0.03))
weight_files._Files.write = lambda self, *a: (write(self, *a), time.sleep(0.03))
kind, source, target = sys.argv[1:]
import_hf(source, target) if kind == "import" else export_hf(source, target, max_shard_bytes=60_000)
"""


@pytest.mark.parametrize("kind", [IMPORT, EXPORT])
def test_kill_9_in_the_middle(kind: str, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    run(kind, folder, checkpoint, tmp_path / "through")
    target = tmp_path / "again"
    command = [sys.executable, "-c", KILLED, kind, str(folder if kind == IMPORT else checkpoint), str(target)]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "kernels", root / "launchers")))}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    journal = tmp_path / "again.tmp" / "journal.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.is_file() and journal.read_bytes().count(b"\n") > 15):
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)  # on a busy machine it would be through before the other one asks
    with pytest.raises(CheckpointError, match="another process is writing"):
        run(kind, folder, checkpoint, target)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # What the kill cut off: half a line, and half a tensor.
    with open(journal, "a") as stream:
        stream.write('{"key": "half')
    last = sorted(p for p in journal.parent.iterdir() if p.suffix in (".distcp", ".safetensors"))[-1]
    with open(last, "ab") as stream:
        stream.write(b"half a tensor")
    assert not target.exists()
    run(kind, folder, checkpoint, target)
    assert contents(target) == contents(tmp_path / "through")


def test_another_job_in_the_same_place_starts_afresh(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mend = failing(monkeypatch, 20, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError):
        import_hf(folder, tmp_path / "c")
    mend()
    done = import_hf(folder, tmp_path / "c", dtype="bf16")
    assert (done.num_resumed, done.dtype) == (0, "bf16")
    reader = CheckpointReader(tmp_path / "c")
    assert {reader.dtype(key) for key in reader.entries} == {torch.bfloat16}


def test_resumed_tensors_are_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mend = failing(monkeypatch, 20, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(OSError):
        import_hf(folder, tmp_path / "c")
    mend()
    assert import_hf(folder, tmp_path / "c").num_resumed == 20


def test_too_little_room_is_told_before_the_first_byte(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(HuggingFaceError, match=r"needs 0\.00 GB more, and its disk has 0\.00 GB free: make room"):
        import_hf(folder, tmp_path / "c")


def test_a_flipped_bit_stops_an_export(folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path / "c")
    file = sorted((tmp_path / "c").glob("*.distcp"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="changed since it was written"):
        export_hf(tmp_path / "c", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_texts_and_unknown_fields_of_an_import_come_out_again(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "hf")
    config = json.loads((folder / "config.json").read_text())
    config |= {"somebodys_field": {"a": 1}, "image_token_index": 7, "auto_map": {"AutoModel": "code.Model"}}
    config["text_config"] |= {"eos_token_id": [2, 5], "another_field": "x"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    (tmp_path / "hf" / "generation_config.json").write_text('{"temperature": 0.5}')
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages }}")
    import_hf(tmp_path / "hf", tmp_path / "c")
    shutil.rmtree(tmp_path / "hf")
    export_hf(tmp_path / "c", tmp_path / "out")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (after["somebodys_field"], after["image_token_index"], after["text_config"]["another_field"]) == ({"a": 1}, 7, "x")
    assert after["text_config"]["eos_token_id"] == [2, 5]
    assert "auto_map" not in after, "code of others is not asked for"
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.5}
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"


def test_journal_forgets_a_line_that_was_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path, {"a": 1})
    journal.add([1, 2])
    journal.close()
    with open(tmp_path / "journal.jsonl", "a") as stream:
        stream.write("3")
    again = Journal(tmp_path, {"a": 1})
    assert again.entries == [1, 2]
    again.add([4])
    again.close()
    last = Journal(tmp_path, {"a": 1})
    assert last.entries == [1, 2, 4]
    last.close()
    (tmp_path / "journal.jsonl").unlink()
    (tmp_path / "mine").touch()
    with pytest.raises(CheckpointError, match="is in the way"):
        Journal(tmp_path, {"a": 1})


def test_the_checkpoint_is_a_complete_one(checkpoint: Path) -> None:
    assert folders.problem(checkpoint) is None
    folders.verify(checkpoint)
    state = folders.read_state(checkpoint)
    assert state["held"] == ["language", "projector", "vision"] and state["has_optimizer"] is False


def test_what_a_kill_left_behind_a_full_file_is_cut(tmp_path: Path) -> None:
    """The journal ends with the last tensor of a file: nothing more is written there, and what lies behind it must go all the same."""
    tensors = {f"language.{i}": torch.full((30_000,), float(i)) for i in range(3)}

    def write(path: Path, keys: list[str]) -> CheckpointWriter:
        writer = CheckpointWriter(path, "job")  # 120 kB a tensor, 100 kB a file
        for key in keys:
            writer.add(key, tensors[key])
        return writer

    write(tmp_path / "through", list(tensors)).finish({})
    write(tmp_path / "again", ["language.0"]).leave()
    with open(tmp_path / "again.tmp" / "__0_0.distcp", "ab") as stream:
        stream.write(b"half a tensor")
    write(tmp_path / "again", ["language.1", "language.2"]).finish({})
    for path in sorted((tmp_path / "through").glob("*.distcp")):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes(), path.name
    folders.verify(tmp_path / "again")


def test_a_write_that_the_system_refuses_is_that_error(tmp_path: Path) -> None:
    """torch's own writer would end with "unexpected pos" instead."""
    writer = CheckpointWriter(tmp_path / "c", "job")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as refused:
            writer.add("language.0", torch.ones(30_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        writer.leave()
    assert refused.value.errno == errno.EFBIG
