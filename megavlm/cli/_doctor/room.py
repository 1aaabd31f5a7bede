"""Room that a recipe's checkpoints take on each tier, beside what they will replace."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.retention import LAST_OF_STAGE, NEWEST, Rules, reasons_to_keep
from megavlm.config.schema import Recipe
from megavlm.planner.checkpoints import checkpoint_bytes, node_bytes


class Room(NamedTuple):
    """Of one tier."""

    folder: Path
    wanted_bytes: int
    """Of as many checkpoints as are kept at a time and the one being written, of the stage that trains most."""
    replaced_bytes: int
    """Of those that lie there and go when newer ones come."""


def durable_room(recipe: Recipe) -> Room:
    """In run.dir."""
    root = Path(recipe.run.dir) / folders.CHECKPOINTS
    wanted = max(checkpoint_bytes(recipe).values()) * (recipe.checkpoint.keep_last + 1)
    return Room(root, wanted, sum(_size(root / name) for name in _replaced(recipe)))


def local_room(recipe: Recipe, world_size: int, ranks_per_node: int) -> Room | None:
    """On a node's own disk; None without a local tier. All that lies there of the run is replaced, or goes at its next start."""
    local = recipe.checkpoint.local
    if local is None:
        return None
    there = folders.local_run_dir(local.dir, recipe.run.name, recipe.run.dir)
    return Room(Path(local.dir), node_bytes(recipe, world_size, ranks_per_node) * (local.keep_last + 1), _size(there))


def _replaced(recipe: Recipe) -> list[str]:
    """Names of checkpoints that are kept for nothing but being the newest, or the last of a stage that goes on."""
    config = recipe.checkpoint
    try:
        reasons = reasons_to_keep(recipe.run.dir, Rules(config.keep_last, config.keep_every_steps, config.keep_best))
        if not reasons:
            return []
        newest = folders.read_state(Path(recipe.run.dir) / folders.CHECKPOINTS / list(reasons)[-1])
    except (CheckpointError, OSError):
        return []
    stage = folders.step_and_stage(list(reasons)[-1])[1]
    steps = {s.name: s.steps for s in recipe.stages}
    goes_on = not newest.get("stage_ended") and newest.get("stage_step", 0) < steps.get(stage, 0)
    passing = {name: {NEWEST, *([LAST_OF_STAGE] if goes_on and folders.step_and_stage(name)[1] == stage else [])} for name in reasons}
    return [name for name, why in reasons.items() if set(why) <= passing[name]]


def _size(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    except OSError:  # a run that is training deletes some of it
        return 0
