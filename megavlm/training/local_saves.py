"""When a stage saves to the nodes' own disks, and what is told of it."""

from __future__ import annotations

from typing import NamedTuple

from megavlm.checkpoint.folders import step_and_stage
from megavlm.checkpoint.saver import Outcome

MOST_LEFT_OUT = 64
"""After many failures every so many local saves one is tried."""


class News(NamedTuple):
    """What people should know."""

    text: str
    is_failure: bool


class LocalSaves:
    """Due every `every_steps`; after each failure in a row twice as rarely, and told of once, until one succeeds again.

    All that it goes by is the same on every rank, and so is what it says.
    """

    def __init__(self, every_steps: int) -> None:
        self._every = every_steps
        self._failures = 0
        self._next = 0

    def is_due(self, step: int) -> bool:
        """Is a local save to be tried after this step?"""
        return step % self._every == 0 and step >= self._next

    def ended(self, outcome: Outcome) -> News | None:
        """Take note of how one ended; returns what is to be told."""
        if outcome.error is None:
            failures, self._failures, self._next = self._failures, 0, 0
            return News(f"local checkpoints are written again, after {failures} attempts that failed", False) if failures else None
        self._failures += 1
        wait = self._every * min(2**self._failures, MOST_LEFT_OUT)
        self._next = step_and_stage(outcome.path.name)[0] + wait
        if self._failures > 1:
            return None
        return News(
            f"{outcome.error}; training goes on without local checkpoints, and tries again after {wait} steps, then more rarely; "
            "this is told once",
            True,
        )
