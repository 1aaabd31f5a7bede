"""Tests that need a process group, each in a forked rank of its own.

A test process that has run gloo once can fork no more ranks: gloo's thread does not survive the fork, and the child waits
for it for ever. So nothing of gloo ever runs in the test process itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from megavlm.testing.pool import RankPool


def in_rank(body: Callable[..., None]) -> Callable[..., None]:
    """A pytest test that runs `body` alone in a rank of the `pool` fixture.

    A parameter `ctx` of the body is the `ParallelContext` of a grid of one; all others are fixtures or parameters of the test
    as usual, and must be picklable.
    """
    signature = inspect.signature(body)
    wants_grid = "ctx" in signature.parameters
    others = [p for name, p in signature.parameters.items() if name != "ctx"]

    def test(pool: RankPool, **given: Any) -> None:
        pool.run(_call, body, given, wants_grid)

    test.__name__, test.__qualname__, test.__module__, test.__doc__ = body.__name__, body.__qualname__, body.__module__, body.__doc__
    pool = inspect.Parameter("pool", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    test.__signature__ = inspect.Signature([pool, *others])  # type: ignore[attr-defined]
    return test


def _call(body: Callable[..., None], given: dict[str, Any], wants_grid: bool) -> None:
    if wants_grid:
        import torch

        from megavlm.config.schema import ParallelConfig
        from megavlm.parallel.context import enter_grid

        given = {**given, "ctx": enter_grid(ParallelConfig(), torch.device("cpu"), 1)}
    body(**given)
