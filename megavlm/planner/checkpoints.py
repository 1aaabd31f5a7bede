"""What a recipe's checkpoints come to: their size, the memory they are saved from, what is kept."""

from __future__ import annotations

from megavlm.config.schema import Recipe
from megavlm.planner.parameters import params
from megavlm.topology.table import human_bytes

_ADAM_BYTES = 8
_MASTER_BYTES = 4


def checkpoint_bytes(recipe: Recipe) -> dict[str, int]:
    """Stage -> bytes of one of its checkpoints: weights, and of what trains Adam's two moments and, unless it is fp32, a master."""
    is_fp32 = recipe.precision.dtype == "fp32"
    weight, state = (4, _ADAM_BYTES) if is_fp32 else (2, _ADAM_BYTES + _MASTER_BYTES)
    return {s.name: sum(weight * c.total + state * c.trainable for c in params(recipe.model, s).values()) for s in recipe.stages}


def checkpoint_table(recipe: Recipe, world_size: int) -> str:
    """In words, a line for each tier."""
    config, sizes = recipe.checkpoint, checkpoint_bytes(recipe)
    each = ", ".join(f"{human_bytes(size)} ({stage})" for stage, size in sizes.items())
    when = "at the end of each stage, at max_steps and on a signal"
    if config.every_steps is not None:
        when = f"every {config.every_steps} steps, {when}"
    kept = [f"the newest {config.keep_last}", "the last of each stage"]
    if config.keep_every_steps is not None:
        kept.append(f"those at multiples of {config.keep_every_steps} steps")
    if config.keep_best:
        kept.append(f"the {config.keep_best} of each stage with the lowest held-out loss")
    lines = [f"checkpoints of {each}: {when}; kept are {', '.join(kept)}"]
    share = human_bytes(max(sizes.values()) // world_size)
    if config.every_steps is not None and config.asynchronous:
        lines.append(f"  written while training goes on, from about {share} of host memory a rank")
    if config.local is not None:
        lines.append(
            f"  on each node's own disk ({config.local.dir}): every {config.local.every_steps} steps, {config.local.keep_last} kept; "
            f"it takes {config.local.keep_last + 1} times what the node's ranks hold ({share} a rank or more)"
        )
    return "\n".join(lines)
