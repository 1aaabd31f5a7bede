"""The sections of a run and their limits (faults.watchdog): what the watchdog is told, in the loop's own words."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from megavlm.config.exits import Exit
from megavlm.config.schema import Recipe
from megavlm.parallel.watchdog import Watchdog, set_earlier_stacks_aside

STACKS_FOLDER = "stacks"
_SAVE_MARGIN_S = 15.0
"""A save has a watchdog of its own; this is for what the loop does around it."""
_SETTING = "faults.watchdog"


class Sections:
    """Of one rank's run. Begins with the set-up; each call begins the next section, and nothing is ever outside of one."""

    def __init__(self, recipe: Recipe) -> None:
        self._limits, self._save_s = recipe.faults.watchdog, recipe.checkpoint.timeout_s
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        folder = Path(recipe.run.dir) / STACKS_FOLDER
        if rank == 0:
            set_earlier_stacks_aside(folder)
        self._dog = Watchdog(folder, rank, size)
        self._is_first, self._has_warned, self._begin = True, False, 0.0

    def __enter__(self) -> Sections:
        self.setup()
        self._dog.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._dog.__exit__(kind, error, trace)

    def setup(self) -> None:
        """The run, or a stage, is being set up; or all is done and the run ends."""
        self._is_first = True
        self._dog.enter("setup", self._limits.setup_s, f"{_SETTING}.setup_s")

    def step(self) -> None:
        """A step begins; what comes behind it belongs to it until another section begins."""
        self._begin = time.monotonic()
        if self._is_first:
            self._dog.enter("the first step", self._limits.first_step_s, f"{_SETTING}.first_step_s")
        else:
            self._dog.enter("a step", self._limits.step_s, f"{_SETTING}.step_s")

    def step_done(self) -> str | None:
        """The step has been made. Returns a warning where it took more than half of what it may, once."""
        seconds, was_first, self._is_first = time.monotonic() - self._begin, self._is_first, False
        limit = self._limits.step_s
        if was_first or limit is None or seconds <= limit / 2 or self._has_warned:
            return None
        self._has_warned = True
        return f"a step took {seconds:.0f} s, and {_SETTING}.step_s={limit:g} ends a run whose step takes longer than that: raise it"

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """A measurement of held-out loss, or the answers behind it."""
        with self._dog.during("an evaluation", self._limits.evaluation_s, f"{_SETTING}.evaluation_s"):
            yield

    @contextmanager
    def checkpoint(self) -> Iterator[None]:
        """A save, as far as the loop waits for it."""
        with self._dog.during("a checkpoint", self._save_s + _SAVE_MARGIN_S, "checkpoint.timeout_s", Exit.SAVE_TIMEOUT):
            yield
