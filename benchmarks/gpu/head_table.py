"""Target-only head on and off: the same targets through megavlm's op, on every position, as full logits, and by Liger."""

from __future__ import annotations

from functools import cache, partial
from importlib.util import find_spec
from typing import Any

from gpu.basics import milliseconds
from gpu.runner import Place, Task, Unavailable

TINY, QWEN3_8B = (64, 32, 256), (8192, 4096, 151936)
"""(positions, width, vocabulary)."""


def tasks(section: str, place: Place) -> dict[str, Task]:
    from head import SIDES

    return {side: partial(measure, side, place) for side in SIDES}


@cache
def _problem(shape: tuple[int, int, int], device: str) -> Any:
    """One for all sides: its numbers are drawn on the host, which takes seconds."""
    from head import Problem

    return Problem(shape, "bf16", device)


def measure(side: str, place: Place) -> dict[str, Any]:
    """Time of forward and backward, on a GPU also what they add to the peak of memory; fails where another loss comes out."""
    import torch
    from head import LIGER, check

    if side in LIGER and place.device == "cpu":
        raise Unavailable("Liger's kernels need a GPU: in Triton's interpreter their time says nothing")
    if side in LIGER and find_spec("liger_kernel") is None:
        raise Unavailable("liger-kernel is not installed")
    shape = TINY if place.tiny else QWEN3_8B
    problem = _problem(shape, place.device)
    check(problem, [side])
    ms = milliseconds(lambda: problem.run(side), place.device, rounds=5, warm_up=1)
    found = {"positions": shape[0], "width": shape[1], "vocabulary": shape[2], "targets": len(problem.rows), "ms": ms}
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.run(side)
        found["added_bytes"] = torch.cuda.max_memory_allocated() - before
    return found
