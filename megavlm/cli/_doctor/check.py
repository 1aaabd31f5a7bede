"""One thing that was tried, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "missing", "broken", "not tried"]


@dataclass(frozen=True)
class Check:
    """A line of the report."""

    name: str
    state: State
    """note: it works, and there is something to know. missing: not here. broken: here, and it does not work."""
    detail: str
    without: str = ""
    """What is lost while it is missing or broken, and what to do."""
    needed: bool = False
    """Nothing runs without it: the exit code is 1 when it is missing or broken."""

    @property
    def is_problem(self) -> bool:
        """Whether it makes the exit code 1."""
        return self.needed and self.state in ("missing", "broken")
