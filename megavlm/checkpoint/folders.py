"""The folder of a run's checkpoints: names, state, completeness. No torch: also for people who only look.

    <run.dir>/checkpoints/<step, 8 digits>-<stage>/   shards of all ranks, their index, state.json, manifest.json
    <run.dir>/checkpoints/latest                      name of the newest, one line of text for scripts to read, written last

A checkpoint is written under a name that ends in `.tmp` and renamed when every file is on the disk. `manifest.json` lists
size and checksum (xxHash, XXH3 of 128 bits: https://xxhash.com; SHA-256 in older ones) of every file: a folder is complete when all of
them are there. `retention` says which are kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from megavlm.checkpoint.errors import CheckpointError, Unreadable
from megavlm.checkpoint.patience import MISSING, patiently

_log = logging.getLogger(__name__)
STATE, MANIFEST, LATEST, CHECKPOINTS, UNFINISHED, REPLACED = "state.json", "manifest.json", "latest", "checkpoints", ".tmp", ".old"
FORMAT = 1
"""Of what `store.save` and `writer` write."""
CHECKSUM = "xxh3_128"
"""Name of the checksum in manifests that are written now."""
_READ_BYTES = 4 << 20
_AHEAD_BYTES = 16 * _READ_BYTES
DAMAGED = ".damaged"
"""Ends the name of a checkpoint that was found damaged: nothing looks at it again, nothing deletes it."""
_NAME = re.compile(r"^(\d{8,})-(.+)$")
_ASIDE = re.compile(r"\.[0-9a-f]{8}\.old$")


def local_run_dir(local_dir: str | Path, run_name: str, run_dir: str | Path) -> Path:
    """A run's folder inside of checkpoint.local.dir, with one for each node in it: other runs of the same name have others."""
    place = hashlib.sha256(str(Path(run_dir).resolve()).encode()).hexdigest()[:8]
    return Path(local_dir) / f"{run_name}-{place}"


def latest(run_dir: str | Path) -> str | None:
    """Name of the checkpoint that was saved last; None before the first."""
    file = Path(run_dir) / CHECKPOINTS / LATEST
    with contextlib.suppress(*MISSING, UnicodeDecodeError):
        return patiently(lambda: file.read_text(encoding="utf-8"), file).strip() or None
    return None


def step_and_stage(name: str) -> tuple[int, str]:
    """What a checkpoint's folder name says."""
    found = _NAME.match(name)
    assert found is not None, f"{name} is no checkpoint's name"
    return int(found.group(1)), found.group(2)


def newest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint of the highest step; None when the run has none. Incomplete and unfinished folders do not count."""
    return next((path for path in reversed(named(run_dir)) if problem(path) is None), None)


def read_state(path: str | Path) -> dict[str, Any]:
    """What `save` was given, with `modules` (module -> folder that holds it), `held` (those in this folder) and versions.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged.
    """
    path = Path(path)
    found = problem(path)
    if found is not None:
        raise CheckpointError(f"{path}: {found}")
    state: dict[str, Any] = _read_json(path / STATE)
    return state


def problem(path: Path) -> str | None:
    """Why this folder is no complete checkpoint, in words; None when it is one. Looks at sizes only.

    Raises:
        Unreadable: nobody can tell now.
    """
    if _stat(path) is None:
        return "there is no such folder"
    missing = [name for name in (STATE, MANIFEST) if _size(path / name) is None]
    if missing:
        return f"it has no {' and no '.join(missing)}: it is not a checkpoint, or its save was interrupted"
    try:
        state = _read_json(path / STATE)
        if not isinstance(state, dict) or not isinstance(state.get("modules", {}), dict):
            return f"its {STATE} is damaged (it is no object with modules)"
        files = _read_json(path / MANIFEST)["files"]
        for name, entry in files.items():
            size = _size(path / name)
            if size is None:
                return f"{name} is missing"
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}: the copy or the disk is damaged"
    except Unreadable:
        raise
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} or {STATE} is damaged ({error})"
    return None


def _stat(path: Path) -> os.stat_result | None:
    try:
        return patiently(path.stat, path)
    except MISSING:
        return None


def _size(file: Path) -> int | None:
    """Bytes; None where there is no such file."""
    found = _stat(file)
    return found.st_size if found is not None and stat.S_ISREG(found.st_mode) else None


def verify(path: Path, names: Iterable[str] | None = None) -> None:
    """Compare the checksums of files (None: all of them) with the manifest. One that differs is read again before it counts as damaged.

    Raises:
        Unreadable: the disk or the file server does not give them.
        CheckpointError: naming those that are damaged.
    """
    files = _read_json(path / MANIFEST)["files"]
    damaged = [name for name in (files if names is None else names) if not _is_as_written(path / name, files[name])]
    if damaged:
        raise CheckpointError(
            f"{path}: {', '.join(damaged)} changed since it was written (its checksum differs from {MANIFEST}'s): "
            "remove this folder to go on from the checkpoint before it"
        )


def manifest_files(path: Path) -> list[str]:
    """Names of the files that the manifest lists."""
    return sorted(_read_json(path / MANIFEST)["files"])


def hasher() -> Any:
    """Of the checksum `CHECKSUM`: has `update(bytes)` and `hexdigest()`. Both let other threads run meanwhile."""
    return xxhash.xxh3_128()


def checksum(file: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    with open(file, "rb") as stream:
        return {"bytes": os.fstat(stream.fileno()).st_size, CHECKSUM: _digest(stream, hasher())}


def _is_as_written(file: Path, entry: dict[str, Any]) -> bool:
    kind, make = (CHECKSUM, hasher) if CHECKSUM in entry else ("sha256", hashlib.sha256)

    def read() -> str:
        with open(file, "rb") as stream:
            return _digest(stream, make())

    if patiently(read, file) == entry[kind]:
        return True
    _forget(file)  # the second reading must be the disk's, and not the first one's copy
    is_right = patiently(read, file) == entry[kind]
    if is_right:
        _log.warning("%s was read wrongly once, and rightly then: look at this machine's memory and at its way to the disk", file)
    return is_right


def _digest(stream: BinaryIO, summing: Any) -> str:
    buffer, place = bytearray(_READ_BYTES), 0
    view = memoryview(buffer)
    while True:
        if place % _AHEAD_BYTES == 0:
            _ask_ahead(stream, place)
        count = stream.readinto(buffer)  # type: ignore[attr-defined]
        if not count:
            return str(summing.hexdigest())
        summing.update(view[:count])
        place += count


def _forget(file: Path) -> None:
    with contextlib.suppress(AttributeError, OSError), open(file, "rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _ask_ahead(stream: BinaryIO, place: int) -> None:
    """Let the system read on while we hash: a disk gives twice as much to many requests as to one after the other."""
    with contextlib.suppress(AttributeError, OSError):  # not on every system, nor every file system
        os.posix_fadvise(stream.fileno(), place, 2 * _AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


def write_json(file: Path, value: Any) -> None:
    """Write and flush to the disk, replacing the file in one step."""
    write_bytes(file, json.dumps(value, indent=1).encode())


def write_bytes(file: Path, data: bytes) -> None:
    """Write and flush to the disk, replacing the file in one step."""
    temporary = file.with_name(file.name + UNFINISHED)
    write_new(temporary, data)
    os.replace(temporary, file)
    sync_folder(file.parent)


def write_new(file: Path, data: bytes) -> None:
    """Write and flush a file to the disk, but not its name: for folders that have no name yet themselves."""
    with open(file, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def recover(run_dir: str | Path) -> None:
    """Give a checkpoint its name back that a kill caught while a newer one of the same name was about to take its place.

    What cannot be read now stays as it is.
    """
    root = Path(run_dir) / CHECKPOINTS

    def give_back(path: Path) -> None:
        original = root / _ASIDE.sub("", path.name)
        if is_leftover(path) and not original.exists() and problem(path) is None:
            path.rename(original)
            sync_folder(root)

    for path in root.glob(f"*{REPLACED}") if root.is_dir() else []:
        with contextlib.suppress(Unreadable):
            patiently(partial(give_back, path), path)


def set_damaged_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, so that nothing takes it for one; returns its new path."""
    aside_as = path.with_name(path.name + DAMAGED)
    if aside_as.exists():
        aside_as = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{DAMAGED}")
    path.rename(aside_as)
    sync_folder(path.parent)
    return aside_as


def publish(unfinished: Path, path: Path) -> None:
    """Give a run's finished checkpoint its name, in the place of an older one of that name, then point `latest` to it."""
    put_in_place(unfinished, path)
    if path.parent.name == CHECKPOINTS:
        write_bytes(path.parent / LATEST, (f"{path.name}\n").encode())


def put_in_place(unfinished: Path, path: Path) -> None:
    """Give a finished folder its name; what had that name is moved aside, and deleted once the new one is there."""
    sync_folder(unfinished)
    replaced = path.rename(aside(path)) if path.exists() else None
    try:
        unfinished.rename(path)
    except OSError:
        if replaced is not None:
            replaced.rename(path)
        raise
    sync_folder(path.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def aside(path: Path) -> Path:
    """A name that nobody else has, for a folder that is about to be deleted."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}{REPLACED}")


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def named(run_dir: str | Path) -> list[Path]:
    """Folders named as checkpoints, by ascending step; at the same step the one that `latest` names comes last."""
    root = Path(run_dir) / CHECKPOINTS

    def read() -> list[Path]:
        return [root / entry.name for entry in os.scandir(root) if entry.is_dir() and _NAME.match(entry.name)]

    try:
        found = patiently(read, root)
    except MISSING:
        return []
    newest_saved = latest(run_dir)
    paths = [p for p in found if not p.name.endswith((UNFINISHED, REPLACED, DAMAGED))]
    return sorted(paths, key=lambda p: (step_and_stage(p.name)[0], p.name == newest_saved, p.name))


def is_leftover(path: Path) -> bool:
    """What an interrupted save or deletion of a checkpoint left; whatever else people put there is theirs."""
    mine = path.name.endswith(UNFINISHED) or _ASIDE.search(path.name) is not None
    return mine and _NAME.match(path.name) is not None and path.is_dir()


def _read_json(file: Path) -> Any:
    try:
        return json.loads(patiently(lambda: file.read_text(encoding="utf-8"), file))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
