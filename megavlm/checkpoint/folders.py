"""The folder of a run's checkpoints: names, state, completeness, which to keep. No torch: also for people who only look.

    <run.dir>/checkpoints/<step, 8 digits>-<stage>/   megatron-core's shards, state.json, manifest.json
    <run.dir>/checkpoints/latest                      name of the newest, one line of text for scripts to read, written last

A checkpoint is written under a name that ends in `.tmp` and renamed when every file is on the disk. `manifest.json` lists
size and SHA-256 of every shard: a folder is complete when all of them are there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megavlm.checkpoint.errors import CheckpointError

STATE, MANIFEST, LATEST, CHECKPOINTS, UNFINISHED, REPLACED = "state.json", "manifest.json", "latest", "checkpoints", ".tmp", ".old"
FORMAT = 1
"""Of what `store.save` and `writer` write."""
_NAME = re.compile(r"^(\d{8,})-(.+)$")
_ASIDE = re.compile(r"\.[0-9a-f]{8}\.old$")


def newest(run_dir: str | Path) -> Path | None:
    """The complete checkpoint of the highest step; None when the run has none. Incomplete and unfinished folders do not count."""
    return next((path for path in reversed(_named(run_dir)) if problem(path) is None), None)


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


def prune(run_dir: str | Path, keep_last: int, keep: Iterable[str] = ()) -> list[str]:
    """Delete complete checkpoints but the newest `keep_last`, the last of every stage and the folder names in `keep`.

    Leftovers of saves that were interrupted go as well. Returns the names that were deleted. One process calls this.
    """
    names = [path.name for path in _named(run_dir) if problem(path) is None]
    last_of_stage = {_NAME.match(name).group(2): name for name in names}  # type: ignore[union-attr]
    kept = {*keep, *last_of_stage.values(), *names[len(names) - keep_last :]}
    root = Path(run_dir) / CHECKPOINTS
    leftovers = [p.name for p in root.glob("*") if _is_leftover(p)] if root.is_dir() else []
    gone = [name for name in names if name not in kept] + leftovers
    for name in gone:
        # Renamed first: a deletion that is cut off must not leave a folder that looks like a checkpoint.
        doomed = root / name
        shutil.rmtree(doomed if name in leftovers else doomed.rename(aside(doomed)))
    return gone


def problem(path: Path) -> str | None:
    """Why this folder is no complete checkpoint, in words; None when it is one. Looks at sizes only."""
    if not path.is_dir():
        return "there is no such folder"
    missing = [name for name in (STATE, MANIFEST) if not (path / name).is_file()]
    if missing:
        return f"it has no {' and no '.join(missing)}: it is not a checkpoint, or its save was interrupted"
    try:
        _read_json(path / STATE)
        files = _read_json(path / MANIFEST)["files"]
        for name, entry in files.items():
            if not (path / name).is_file():
                return f"{name} is missing"
            size = (path / name).stat().st_size
            if size != entry["bytes"]:
                return f"{name} has {size} bytes instead of {entry['bytes']}: the copy or the disk is damaged"
    except (CheckpointError, KeyError, TypeError, AttributeError) as error:
        return f"its {MANIFEST} or {STATE} is damaged ({error})"
    return None


def verify(path: Path, names: Iterable[str] | None = None) -> None:
    """Compare the SHA-256 of files (None: all of them) with the manifest. Raises CheckpointError naming the damaged ones."""
    files = _read_json(path / MANIFEST)["files"]
    damaged = [name for name in (files if names is None else names) if checksum(path / name)["sha256"] != files[name]["sha256"]]
    if damaged:
        raise CheckpointError(
            f"{path}: {', '.join(damaged)} changed since it was written (SHA-256 differs from {MANIFEST}): "
            "remove this folder to go on from the checkpoint before it"
        )


def manifest_files(path: Path) -> list[str]:
    """Names of the files that the manifest lists."""
    return sorted(_read_json(path / MANIFEST)["files"])


def checksum(file: Path) -> dict[str, Any]:
    """A file's entry in the manifest."""
    with open(file, "rb") as stream:
        return {"bytes": os.fstat(stream.fileno()).st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def write_json(file: Path, value: Any) -> None:
    """Write and flush to the disk, replacing the file in one step."""
    write_text(file, json.dumps(value, indent=1))


def write_text(file: Path, text: str) -> None:
    """The same for text."""
    temporary = file.with_name(file.name + UNFINISHED)
    with open(temporary, "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, file)
    sync_folder(file.parent)


def publish(unfinished: Path, path: Path) -> None:
    """Give a run's finished checkpoint its name, in the place of an older one of that name, then point `latest` to it."""
    put_in_place(unfinished, path)
    if path.parent.name == CHECKPOINTS:
        write_text(path.parent / LATEST, f"{path.name}\n")


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


def _named(run_dir: str | Path) -> list[Path]:
    """Folders named as checkpoints, by ascending step; at the same step the one that `latest` names comes last."""
    root = Path(run_dir) / CHECKPOINTS
    if not root.is_dir():
        return []
    latest = ""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        latest = (root / LATEST).read_text(encoding="utf-8").strip()
    paths = [p for p in root.iterdir() if p.is_dir() and _NAME.match(p.name) and not p.name.endswith((UNFINISHED, REPLACED))]
    return sorted(paths, key=lambda p: (int(_NAME.match(p.name).group(1)), p.name == latest, p.name))  # type: ignore[union-attr]


def _is_leftover(path: Path) -> bool:
    """What an interrupted save or deletion of a checkpoint left; whatever else people put there is theirs."""
    mine = path.name.endswith(UNFINISHED) or _ASIDE.search(path.name) is not None
    return mine and _NAME.match(path.name) is not None and path.is_dir()


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
