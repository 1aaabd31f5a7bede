"""What lies in a run's folder of checkpoints, in words: for people and programs that look. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError, Unreadable
from megavlm.checkpoint.patience import without_waiting

RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Entry:
    """One folder."""

    name: str
    path: str
    tier: Literal["durable", "local"]
    """local: this node's part of a checkpoint on the node's own disk."""
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


@without_waiting()
def survey(run_dir: str | Path) -> list[Entry]:
    """Every checkpoint of a run, by ascending step; then what is none: what unfinished saves left, and what was found damaged.

    Checkpoints on a node's own disk are those of this node. Whether the other nodes have theirs, only a start knows.

    Raises:
        CheckpointError: there is no folder of checkpoints.
    """
    root = checkpoints_of(run_dir)
    latest = folders.latest(run_dir)
    found = [(path, False) for path in folders.named(run_dir)]
    found += [(path, True) for node in local_checkpoints(run_dir) for path in folders.named(node)]
    found.sort(key=lambda item: (folders.step_and_stage(item[0].name)[0], item[1]))
    problems = [_problem(path) for path, _ in found]
    resumed = [item for item, problem in zip(found, problems, strict=True) if problem is None][-1:]
    others = sorted(path for path in root.iterdir() if folders.is_leftover(path) or is_set_aside(path))
    entries = [_entry(*item, problem, item in resumed, latest) for item, problem in zip(found, problems, strict=True)]
    return entries + [_entry(path, False, _left_by(path), False, latest) for path in others]


def is_set_aside(path: Path) -> bool:
    """Whether a start found this checkpoint damaged."""
    return path.name.endswith(folders.DAMAGED) and path.is_dir() and path.name[:8].isdigit()


def local_checkpoints(run_dir: str | Path) -> list[Path]:
    """What this node sees of the run's local tier, as its recipe names it: its own folder, and the others' where they share a disk."""
    try:
        recipe: Any = yaml.safe_load((Path(run_dir) / RECIPE).read_text(encoding="utf-8"))
        local = recipe["checkpoint"]["local"]
        root = None if local is None else folders.local_run_dir(local["dir"], recipe["run"]["name"], run_dir)
        return [] if root is None or not root.is_dir() else sorted(path for path in root.iterdir() if path.is_dir())
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return []


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
    """Everything that is wrong with a checkpoint, in words, file by file: missing, of another size or another checksum, or not to be read.

    `read` hears of every file's bytes when they have been compared.
    """
    whole = _problem(path)
    names = _manifest(path)
    found = [] if whole is None else [whole]
    for name in names:
        if not (path / name).is_file():
            found.append(f"{name} is missing")
            continue
        try:
            folders.verify(path, [name])
        except Unreadable as error:
            found.append(str(error))
            continue
        except (CheckpointError, OSError, KeyError, TypeError):
            found.append(f"{name} changed since it was written")
        read((path / name).stat().st_size)
    return list(dict.fromkeys(found))


def newest_good(run_dir: str | Path, read: Callable[[int], None] = lambda count: None) -> str | None:
    """Name of the newest checkpoint whose every checksum holds; None when there is none."""
    return next((path.name for path in reversed(folders.named(run_dir)) if not damage(path, read)), None)


def _problem(path: Path) -> str | None:
    try:
        return folders.problem(path)
    except Unreadable as error:
        return str(error)


def _manifest(path: Path) -> list[str]:
    try:
        return folders.manifest_files(path)
    except (CheckpointError, KeyError, TypeError, AttributeError):
        return []


def _left_by(path: Path) -> str:
    return "a start found it damaged, and put it aside" if is_set_aside(path) else "an interrupted save or deletion left it"


def _entry(path: Path, is_local: bool, problem: str | None, resumes: bool, latest: str | None) -> Entry:
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
        tier="local" if is_local else "durable",
        step=step,
        stage=stage,
        size_bytes=sum(stat.st_size for stat in stats),
        age_s=max(0.0, time.time() - written),
        modules=tuple(map(str, held)) if isinstance(held, list) else (),
        has_optimizer=bool(state.get("has_optimizer")),
        problem=problem,
        is_latest=path.name == latest and not is_local,
        resumes=resumes,
    )
