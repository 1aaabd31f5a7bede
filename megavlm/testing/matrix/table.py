"""The table of docs/reliability.md from what was measured: `python -m megavlm.testing.matrix.table RESULTS.json docs/reliability.md`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from megavlm.testing.page import arguments, put_between

BEGIN, END = "<!-- table: made by `make faults` -->", "<!-- end of table -->"
COLUMNS = ("what happens", "exit code", "noticed after", "first new step after", "both (goal)", "steps made again", "losses")
RESULTS = "MEGAVLM_FAULTS_RESULTS"
"""An environment variable: the file that what was measured is written to."""
Figures = dict[str, dict[str, Any]]
"""Fault -> what was measured: what (words), code, detect_s, resume_s, goal_s, lost (steps), loss."""
Results = Mapping[str, Any]
"""rows (Figures), seconds that all of it took, cores, load (of the machine when it began), and date."""


@contextmanager
def collected() -> Iterator[Figures]:
    """What the tests of this process measure; in the end it is written to the file that $MEGAVLM_FAULTS_RESULTS names, if any."""
    rows: Figures = {}
    load, target = os.getloadavg()[0], os.environ.get(RESULTS)
    yield rows
    if target and rows:
        seconds = time.time() - psutil.Process().create_time()
        results = {"rows": rows, "seconds": seconds, "cores": os.cpu_count(), "load": load, "date": time.strftime("%F")}
        Path(target).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def table(results: Results) -> str:
    """Markdown: one row a fault, an empty cell for what a fault does not have; below it how it was measured, and goals that were missed."""
    rows = list(results["rows"].values())
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *(_row(found) for found in rows), ""]
    missed = [found["what"] for found in rows if found.get("goal_s") is not None and _both(found) > found["goal_s"]]
    lines.append(f"- Goals missed: {'; '.join(missed) or 'none'}.")
    lines.append(
        f"- Measured on {results['date']} in {results['seconds'] / 60:.1f} minutes in all, on {results['cores']} cores with a load of "
        f"{results['load']:.1f} when it began."
    )
    return "\n".join(lines)


def _row(found: Mapping[str, Any]) -> str:
    both = "" if found.get("goal_s") is None else f"{_both(found):.1f} s ({found['goal_s']:g} s)"
    cells = [found["what"], _text(found.get("code")), _seconds(found, "detect_s"), _seconds(found, "resume_s"), both]
    return "| " + " | ".join([*cells, _text(found.get("lost")), _text(found.get("loss"))]) + " |"


def _both(found: Mapping[str, Any]) -> float:
    return float(found["detect_s"] + found["resume_s"])


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _seconds(found: Mapping[str, Any], name: str) -> str:
    return "" if found.get(name) is None else f"{found[name]:.1f} s"


def write(results: Results, page: Path) -> None:
    """Put the table between the page's two marks."""
    put_between(BEGIN, END, table(results), page)


if __name__ == "__main__":
    write(*arguments())
