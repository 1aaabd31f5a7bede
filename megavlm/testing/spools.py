"""What waits for MLflow in a run's spools, for tests."""

from __future__ import annotations

from pathlib import Path

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
