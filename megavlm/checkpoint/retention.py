"""Which checkpoints of a run are kept, and deleting the others. No torch: also for people who only tidy up.

Kept are the newest ones, the last of every stage, those at chosen steps, the best by held-out loss, and every one that holds a module
which a kept one does not hold itself.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError, Unreadable
from megavlm.checkpoint.patience import without_waiting

_log = logging.getLogger(__name__)
NEWEST, LAST_OF_STAGE = "newest", "last of its stage"
"""Reasons to keep a checkpoint that a later one may take over."""
HELD_OUT_LOSS = "held_out_loss"
"""In a checkpoint's state: the loss on held-out data that its weights had, or None where it was not measured."""


@dataclass(frozen=True)
class Rules:
    """What to keep of a run; the fields of `checkpoint` in a recipe."""

    keep_last: int
    """So many of the newest."""
    keep_every_steps: int | None = None
    """Those at multiples of this step."""
    keep_best: int = 0
    """So many of each stage with the lowest held-out loss."""
    keep: frozenset[str] = frozenset()
    """Folder names that are kept whatever else is said."""


@without_waiting()
def reasons_to_keep(run_dir: str | Path, rules: Rules) -> dict[str, list[str]]:
    """Complete checkpoint (folder name, by ascending step) -> why it is kept; no reason: `prune` would delete it.

    One that cannot be read now is not among them: nothing deletes it, and it counts for nothing.
    """
    states, unread = _read(run_dir)
    reasons: dict[str, list[str]] = {name: [] for name in states}
    names = list(reasons)
    for name in names[max(len(names) - rules.keep_last, 0) :]:
        reasons[name].append(NEWEST)
    for name in {folders.step_and_stage(name)[1]: name for name in names}.values():
        reasons[name].append(LAST_OF_STAGE)
    for name in names if rules.keep_every_steps else []:
        if folders.step_and_stage(name)[0] % (rules.keep_every_steps or 1) == 0:
            reasons[name].append(f"at a multiple of {rules.keep_every_steps} steps")
    for name in _best(states, rules.keep_best):
        reasons[name].append("lowest held-out loss")
    for name in rules.keep & set(names):
        reasons[name].append("asked for")
    # What an unreadable one needs, it does not say: as a rule what the one before it does.
    for name, like in {**{name: name for name in names if reasons[name]}, **unread}.items():
        # These hold modules themselves: no chain of them has to be followed.
        for module, home in states[like].get("modules", {}).items():
            if home in reasons and home != like:
                reasons[home].append(f"holds {module} of {name}")
    return reasons


def prune(run_dir: str | Path, rules: Rules, *, leftovers: bool = True) -> list[str]:
    """Delete complete checkpoints that no rule keeps; returns their names. One process calls this.

    With `leftovers`, what interrupted saves and deletions left goes too: not while another process may be saving.
    """
    root = Path(run_dir) / folders.CHECKPOINTS
    gone = [name for name, why in reasons_to_keep(run_dir, rules).items() if not why]
    _delete(root / name for name in gone)
    return gone + (remove_leftovers(root) if leftovers else [])


@without_waiting()
def prune_local(run_dir: str | Path, number: int, newest: str, under_way: str) -> None:
    """Delete all but `number` complete checkpoints of a node, of which the one named `newest` is the last.

    What comes behind that one is of steps that were given up, and lost anyway. Of what is unfinished, folders with `under_way` in their
    names stay: somebody may be writing them. So does what cannot be read now, which does not count.
    """
    paths = folders.named(run_dir)
    root = Path(run_dir) / folders.CHECKPOINTS
    until = paths.index(root / newest) + 1 if root / newest in paths else len(paths)
    whole, unread = [], []
    for path in paths[:until]:
        try:
            whole += [path] if folders.problem(path) is None else []
        except Unreadable:
            unread.append(path)
    kept = {*whole[-number:], *unread}
    _delete(path for path in paths if path not in kept)
    remove_leftovers(root, under_way)


def remove_strangers(run_dir: Path, nodes: Iterable[str]) -> None:
    """Delete from a run's folder in the local tier what is of none of these nodes: of machines that had other names or are gone.

    No start uses it again. Several nodes may do this at a time to a folder that they share. What a disk gives errors for stays.
    """
    own = set(nodes)
    try:
        for path in run_dir.iterdir() if run_dir.is_dir() else []:
            if path.name not in own and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
    except OSError as error:
        _log.warning("%s cannot be read (%s): what other machines left there stays", run_dir, error.strerror or error)


def remove_leftovers(root: Path, spare: str | None = None) -> list[str]:
    """Delete what interrupted saves and deletions left in a folder of checkpoints; returns the names. Those with `spare` in them stay."""
    found = [p for p in root.glob("*") if folders.is_leftover(p) and (spare is None or spare not in p.name)] if root.is_dir() else []
    _delete(found)
    return [path.name for path in found]


def _delete(paths: Iterable[Path]) -> None:
    """One that cannot be deleted keeps no other from it; the first error is raised behind all."""
    errors: list[OSError] = []
    for path in paths:
        try:
            # Renamed first: a deletion that is cut off must not leave a folder that looks like a checkpoint.
            shutil.rmtree(path if folders.is_leftover(path) else path.rename(folders.aside(path)))
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _read(run_dir: str | Path) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """States of the complete checkpoints, by ascending step; those that cannot be read now, each with the complete one before it."""
    states: dict[str, dict[str, Any]] = {}
    unread: dict[str, str] = {}
    for path in folders.named(run_dir):
        try:
            states[path.name] = folders.read_state(path)
        except Unreadable:
            unread |= {path.name: list(states)[-1]} if states else {}
        except CheckpointError:
            continue
    return states, unread


def _best(states: Mapping[str, Mapping[str, Any]], number: int) -> list[str]:
    by_stage: dict[str, list[tuple[float, str]]] = {}
    for name, state in states.items() if number else []:
        loss = state.get(HELD_OUT_LOSS)
        if isinstance(loss, int | float) and loss == loss:
            by_stage.setdefault(folders.step_and_stage(name)[1], []).append((float(loss), name))
    return [name for measured in by_stage.values() for _, name in sorted(measured)[:number]]
