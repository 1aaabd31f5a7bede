"""Is a run that was stopped and resumed the same as one that was not, to the last bit of its weights and optimizer state?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gpu.runner import Place, Task
from gpu.training import TINY, make_recipe, train

STEPS = 3
"""Before and after the break."""


def tasks(section: str, place: Place) -> dict[str, Task]:
    return {"bit-exact": lambda: bit_exact(place)}


def bit_exact(place: Place) -> dict[str, Any]:
    """Train 2 n steps, and n steps, stop, resume, n steps. Where they differ a second unbroken run tells whether training itself does."""
    whole = _train(place, "whole", 2 * STEPS)
    _train(place, "broken", STEPS)
    resumed = _train(place, "broken", 2 * STEPS)
    differing = _differing(_last_checkpoint(place, "whole"), _last_checkpoint(place, "broken"))
    same = whole == resumed and not differing
    found: dict[str, Any] = {"same": same, "steps": 2 * STEPS, "whole": whole, "resumed": resumed, "tensors_that_differ": differing[:10]}
    if not same:
        found["repeatable_without_resume"] = _train(place, "again", 2 * STEPS) == whole
    return found


def _train(place: Place, name: str, steps: int) -> list[list[float]]:
    """[loss, gradient norm] of each step; the stage is always as long, so that its schedule is the same."""
    size = dict(TINY) if place.tiny else {
        "vision": {"image_size_px": 448, "num_layers": 4, "hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 2048},
        "language": {
            "vocab_size": 8192, "num_layers": 4, "hidden_size": 1024, "num_attention_heads": 8, "num_query_groups": 4,
            "ffn_hidden_size": 4096, "max_positions": 8192,
        },
    }  # fmt: skip
    base = make_recipe(place, f"resume-{name}", 2 * STEPS, {}).model_dump()
    base["run"] |= {"deterministic": True, "max_steps": steps}
    for module, sizes in size.items():
        base["model"][module] |= sizes
    from megavlm.config.schema import Recipe

    records = train(Recipe.model_validate(base))
    assert len(records) == steps, f"{len(records)} steps instead of {steps}"
    return [[record["loss"], record["grad_norm"]] for record in records]


def _last_checkpoint(place: Place, name: str) -> Path:
    from megavlm.checkpoint import store

    newest = store.newest(Path(place.folder) / "runs" / f"resume-{name}")
    assert newest is not None, f"the run {name} left no checkpoint"
    return newest


def _differing(first: Path, second: Path) -> list[str]:
    """Names of tensors that are not the same, bit by bit, in both checkpoints."""
    import torch

    from megavlm.checkpoint.random_states import PREFIX
    from megavlm.checkpoint.reader import CheckpointReader

    one, two = CheckpointReader(first), CheckpointReader(second)
    assert one.entries, f"{first} holds no tensor"
    names = {name for name in one.entries.keys() | two.entries.keys() if not name.startswith(PREFIX)}  # threads beside training may draw
    both = one.entries.keys() & two.entries.keys()
    return sorted(name for name in names if name not in both or not torch.equal(one.tensor(name), two.tensor(name)))
