"""What a recipe's checkpoints come to: their size, the memory they are saved from, what is kept."""

from __future__ import annotations

from megavlm.config.schema import Recipe
from megavlm.planner.parameters import params
from megavlm.topology.grid import RankGrid
from megavlm.topology.table import human_bytes

_ADAM_BYTES = 8
_MASTER_BYTES = 4


def checkpoint_bytes(recipe: Recipe) -> dict[str, int]:
    """Stage -> bytes of one of its checkpoints: weights, and of what trains Adam's two moments and, unless it is fp32, a master."""
    return {stage: weights + states for stage, (weights, states) in _weights_and_states(recipe).items()}


def node_bytes(recipe: Recipe, world_size: int, ranks_per_node: int) -> int:
    """Bytes of what the ranks of a node hold of the largest checkpoint: a local checkpoint, about.

    Those of the node whose ranks cover most of the tensor and pipeline axes. What data ranks hold alike is there once a node, and what ZeRO
    deals out by shares. So many ranks that the recipe cannot be laid out on them count as the next number that it can.
    """
    parallel = recipe.parallel
    model_ranks = parallel.tensor * parallel.context * parallel.pipeline
    copies = -(-world_size // model_ranks)
    grid = RankGrid(model_ranks * copies, parallel.tensor, parallel.pipeline, context=parallel.context, data=copies)
    covered: dict[int, set[tuple[int, int]]] = {}
    for rank in range(grid.world_size):
        place = grid.coordinates(rank)
        covered.setdefault(rank // ranks_per_node, set()).add((place.tensor, place.pipeline))
    of_group = max(map(len, covered.values())) / (parallel.tensor * parallel.pipeline)
    of_all = min(1.0, ranks_per_node / grid.world_size)
    of_weights, of_states = (of_all if parallel.zero >= zero else of_group for zero in (3, 1))
    return int(max(of_weights * weights + of_states * states for weights, states in _weights_and_states(recipe).values()))


def _weights_and_states(recipe: Recipe) -> dict[str, tuple[int, int]]:
    weight, state = (4, _ADAM_BYTES) if recipe.precision.dtype == "fp32" else (2, _ADAM_BYTES + _MASTER_BYTES)
    counts = {stage.name: params(recipe.model, stage).values() for stage in recipe.stages}
    return {name: (sum(weight * c.total for c in of), sum(state * c.trainable for c in of)) for name, of in counts.items()}


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
