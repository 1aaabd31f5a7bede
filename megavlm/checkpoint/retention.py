"""Which checkpoints of a run are kept, and deleting the others. No torch: also for people who only tidy up.

Kept are the newest ones, the last of every stage, those at chosen steps, the best by held-out loss, and every one that holds a module
which a kept one does not hold itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError

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


def reasons_to_keep(run_dir: str | Path, rules: Rules) -> dict[str, list[str]]:
    """Complete checkpoint (folder name, by ascending step) -> why it is kept; no reason: `prune` would delete it."""
    paths = [path for path in folders.named(run_dir) if folders.problem(path) is None]
    reasons: dict[str, list[str]] = {path.name: [] for path in paths}
    names = list(reasons)
    for name in names[max(len(names) - rules.keep_last, 0) :]:
        reasons[name].append(NEWEST)
    for name in {folders.step_and_stage(name)[1]: name for name in names}.values():
        reasons[name].append(LAST_OF_STAGE)
    for name in names if rules.keep_every_steps else []:
        if folders.step_and_stage(name)[0] % (rules.keep_every_steps or 1) == 0:
            reasons[name].append(f"at a multiple of {rules.keep_every_steps} steps")
    for name in _best(paths, rules.keep_best):
        reasons[name].append("lowest held-out loss")
    for name in rules.keep & set(names):
        reasons[name].append("asked for")
    for path in paths:
        if reasons[path.name]:
            # These hold modules themselves: no chain of them has to be followed.
            for module, home in folders.read_state(path).get("modules", {}).items():
                if home in reasons and home != path.name:
                    reasons[home].append(f"holds {module} of {path.name}")
    return reasons


def prune(run_dir: str | Path, rules: Rules, *, leftovers: bool = True) -> list[str]:
    """Delete complete checkpoints that no rule keeps; returns their names. One process calls this.

    With `leftovers`, what interrupted saves and deletions left goes too: not while another process may be saving.
    """
    root = Path(run_dir) / folders.CHECKPOINTS
    gone = [name for name, why in reasons_to_keep(run_dir, rules).items() if not why]
    for name in gone:
        # Renamed first: a deletion that is cut off must not leave a folder that looks like a checkpoint.
        shutil.rmtree((root / name).rename(folders.aside(root / name)))
    return gone + (remove_leftovers(root) if leftovers else [])


def prune_local(run_dir: str | Path, number: int, newest: str, under_way: str) -> None:
    """Delete all but `number` complete checkpoints of a node, of which the one named `newest` is the last.

    What comes behind that one is of steps that were given up, and lost anyway. Of what is unfinished, folders with `under_way` in their
    names stay: somebody may be writing them.
    """
    paths = folders.named(run_dir)
    root = Path(run_dir) / folders.CHECKPOINTS
    until = paths.index(root / newest) + 1 if root / newest in paths else len(paths)
    kept = [path for path in paths[:until] if folders.problem(path) is None][-number:]
    for path in paths:
        if path not in kept:
            shutil.rmtree(path.rename(folders.aside(path)))
    remove_leftovers(root, under_way)


def remove_leftovers(root: Path, spare: str | None = None) -> list[str]:
    """Delete what interrupted saves and deletions left in a folder of checkpoints; returns the names. Those with `spare` in them stay."""
    found = [p for p in root.glob("*") if folders.is_leftover(p) and (spare is None or spare not in p.name)] if root.is_dir() else []
    for path in found:
        shutil.rmtree(path)
    return [path.name for path in found]


def _best(paths: Iterable[Path], number: int) -> list[str]:
    by_stage: dict[str, list[tuple[float, str]]] = {}
    for path in paths if number else []:
        try:
            loss = folders.read_state(path).get(HELD_OUT_LOSS)
        except CheckpointError:
            continue
        if isinstance(loss, int | float) and loss == loss:
            by_stage.setdefault(folders.step_and_stage(path.name)[1], []).append((float(loss), path.name))
    return [name for measured in by_stage.values() for _, name in sorted(measured)[:number]]
