"""What waits for MLflow in a run's spools, and the recipe that `megavlm track replay` reads, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megavlm.config.load import dump_recipe
from megavlm.config.schema import Recipe
from megavlm.tracking.spool import Item, SpoolReader
from megavlm.tracking.spool_folders import PARTS, spools_of


def spooled(run_dir: Path) -> list[Item]:
    """Records of all spools of a run, the oldest spool first. Raises ValueError for a line that is none."""
    found: list[Item] = []
    for folder in spools_of(run_dir):
        for part in PARTS:
            items, bad, _ = SpoolReader(folder / part).peek(1 << 20)
            if bad:
                raise ValueError(f"{folder / part} has lines that are no records: {bad}")
            found += items
    return found


def write_recipe(run_dir: Path) -> None:
    """A run named "n" without anything to train on."""
    recipe: dict[str, Any] = {"run": {"dir": str(run_dir), "name": "n"}, "data": {"sources": {"a": {"path": "x"}}}}
    recipe["stages"] = [{"name": "s", "steps": 1, "mixture": {"a": 1}}]
    dump_recipe(Recipe.model_validate(recipe), run_dir / "recipe.yaml")
