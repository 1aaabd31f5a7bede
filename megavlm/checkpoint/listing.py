"""What lies in a run's folder of checkpoints, in words: for people and programs that look. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError

DURABLE = "durable"


@dataclass(frozen=True)
class Entry:
    """One folder."""

    name: str
    path: str
    step: int
    stage: str
    size_bytes: int
    """Of all its files."""
    age_s: float
    """Since its state was written; since its newest file, where there is none."""
    modules: tuple[str, ...]
    """Top-level modules whose weights it holds."""
    has_optimizer: bool
    problem: str | None
    """Why it is no complete checkpoint; None: it is one, as far as names and sizes tell."""
    is_latest: bool
    """`latest` names it."""
    resumes: bool
    """A start of the run would take it, if its checksums hold."""


def survey(run_dir: str | Path) -> list[Entry]:
    """Every checkpoint of a run, and what unfinished saves left, by ascending step.

    Raises:
        CheckpointError: there is no folder of checkpoints.
    """
    root = checkpoints_of(run_dir)
    chosen, latest = folders.newest(run_dir), _latest(root)
    return [_entry(path, chosen, latest) for path in [*folders.named(run_dir), *_leftovers(root)]]


def checkpoints_of(run_dir: str | Path) -> Path:
    """The folder of a run's checkpoints. Raises CheckpointError where there is none."""
    root = Path(run_dir) / folders.CHECKPOINTS
    if not root.is_dir():
        raise CheckpointError(f"{run_dir} is no run's folder, or nothing was saved in it yet: there is no {root}")
    return root


def chosen(where: str | Path, names: Iterable[str]) -> list[Path]:
    """The checkpoints of those names of a run (none given: all that are no leftovers), or a checkpoint's folder itself.

    Raises:
        CheckpointError: none of that name, or none at all.
    """
    names = list(names)
    if not names and (Path(where) / folders.STATE).is_file():
        return [Path(where)]
    root = checkpoints_of(where)
    there = {path.name: path for path in folders.named(where)}
    unknown = [name for name in names if name not in there]
    if unknown or not there:
        raise CheckpointError(f"{root} holds no {', '.join(unknown) or 'checkpoint'} (there are: {', '.join(there) or 'none'})")
    return [there[name] for name in names] if names else list(there.values())


def bytes_to_verify(path: Path) -> int:
    """Bytes of the files that a checkpoint's manifest names and that are there."""
    return sum((path / name).stat().st_size for name in _manifest(path) if (path / name).is_file())


def damage(path: Path, read: Callable[[int], None] = lambda count: None) -> list[str]:
    """Everything that is wrong with a checkpoint, in words, file by file: missing, of another size or another checksum.

    `read` hears of every file's bytes when they have been compared.
    """
    whole = folders.problem(path)
    names = _manifest(path)
    found = [] if whole is None else [whole]
    for name in names:
        if not (path / name).is_file():
            found.append(f"{name} is missing")
            continue
        try:
            folders.verify(path, [name])
        except (CheckpointError, OSError, KeyError, TypeError):
            found.append(f"{name} changed since it was written")
        read((path / name).stat().st_size)
    return list(dict.fromkeys(found))


def newest_good(run_dir: str | Path, read: Callable[[int], None] = lambda count: None) -> str | None:
    """Name of the newest checkpoint whose every checksum holds; None when there is none."""
    return next((path.name for path in reversed(folders.named(run_dir)) if not damage(path, read)), None)


def _manifest(path: Path) -> list[str]:
    try:
        return folders.manifest_files(path)
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return []


def _latest(root: Path) -> str | None:
    try:
        return (root / folders.LATEST).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def _leftovers(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if folders.is_leftover(path))


def _entry(path: Path, chosen: Path | None, latest: str | None) -> Entry:
    problem = "an interrupted save or deletion left it" if folders.is_leftover(path) else folders.problem(path)
    stats = [file.stat() for file in path.rglob("*") if file.is_file()]
    state = {}
    try:
        state = json.loads((path / folders.STATE).read_text(encoding="utf-8"))
        written = (path / folders.STATE).stat().st_mtime
    except (OSError, ValueError):
        written = max((stat.st_mtime for stat in stats), default=path.stat().st_mtime)
    state = state if isinstance(state, dict) else {}
    step, stage = folders.step_and_stage(path.name)
    held = state.get("held", [])
    return Entry(
        name=path.name,
        path=str(path),
        step=step,
        stage=stage,
        size_bytes=sum(stat.st_size for stat in stats),
        age_s=max(0.0, time.time() - written),
        modules=tuple(map(str, held)) if isinstance(held, list) else (),
        has_optimizer=bool(state.get("has_optimizer")),
        problem=problem,
        is_latest=path.name == latest,
        resumes=path == chosen,
    )
