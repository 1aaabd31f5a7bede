"""What is wrong with a recipe, in a form that a person can act on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Mistake:
    """One thing to mend in a recipe."""

    path: str
    """Dotted path of the field, such as stages[1].optimizer.lr; "" when it concerns the whole file."""
    problem: str
    """What was given, what is allowed, what to do."""
    origin: str = ""
    """Where the value was set: "file.yaml:12", or the override; "" when nothing set it."""

    def __str__(self) -> str:
        where = f"  [{self.origin}]" if self.origin else ""
        return f"{self.path}: {self.problem}{where}" if self.path else f"{self.problem}{where}"


class RecipeError(ValueError):
    """A recipe that cannot be run: all of its mistakes at once, so that they are mended in one go."""

    def __init__(self, source: str, mistakes: Sequence[Mistake] | Mistake | str) -> None:
        if isinstance(mistakes, str):
            mistakes = [Mistake("", mistakes)]
        elif isinstance(mistakes, Mistake):
            mistakes = [mistakes]
        self.source = source
        self.mistakes = list(mistakes)
        if len(self.mistakes) == 1:
            message = f"{source}: {self.mistakes[0]}"
        else:
            message = "\n  ".join([f"{source}: {len(self.mistakes)} mistakes", *(str(m) for m in self.mistakes)])
        super().__init__(message)
