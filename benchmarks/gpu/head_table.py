"""Target-only head on and off: the same targets through megavlm's op, on every position, as full logits, and by Liger."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

from gpu.basics import milliseconds
from gpu.runner import Place, Task, Unavailable


def tasks(section: str, place: Place) -> dict[str, Task]:
    from head import SIDES

    return {side: partial(measure, side, place) for side in SIDES}


def measure(side: str, place: Place) -> dict[str, Any]:
    """Time of forward and backward, on a GPU also what they add to the peak of memory; fails where another loss comes out."""
    import torch
    from head import LIGER, Problem, check

    if side in LIGER and place.device == "cpu":
        raise Unavailable("Liger's kernels need a GPU: in Triton's interpreter their time says nothing")
    if side in LIGER and find_spec("liger_kernel") is None:
        raise Unavailable("liger-kernel is not installed")
    shape = (64, 32, 256) if place.tiny else (8192, 4096, 151936)
    problem = Problem(shape, "bf16", place.device)
    check(problem, [side])
    ms = milliseconds(lambda: problem.run(side), place.device, rounds=5, warm_up=1)
    found = {"positions": shape[0], "width": shape[1], "vocabulary": shape[2], "targets": len(problem.rows), "ms": ms}
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.run(side)
        found["added_bytes"] = torch.cuda.max_memory_allocated() - before
    return found
