"""The table of docs/reliability.md from what was measured: `python -m megavlm.testing.matrix.table FOLDER docs/reliability.md`."""

from __future__ import annotations

import json
import os
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

from megavlm.testing.matrix.faults import DAMAGES, FAULTS
from megavlm.testing.page import put_between

BEGIN, END = "<!-- table: made by `make faults` -->", "<!-- end of table -->"
COLUMNS = ("what happens", "exit code", "noticed after", "first new step after", "both (goal)", "steps made again", "losses")
RESULTS = "MEGAVLM_FAULTS_RESULTS"
"""An environment variable: the folder that every test process writes what it measured to."""
Figures = dict[str, dict[str, Any]]
"""Fault -> what was measured: what (words), code, detect_s, resume_s, goal_s, lost (steps), loss."""
Results = Mapping[str, Any]
"""rows (Figures), began and ended (seconds of the clock), cores, load (of the machine when it began), and date."""
_NAMES = [*(fault.name for fault in FAULTS), *(damage.name for damage in DAMAGES)]


@contextmanager
def collected() -> Iterator[Figures]:
    """What the tests of this process measure; in the end it goes to a file in the folder that $MEGAVLM_FAULTS_RESULTS names, if any."""
    rows: Figures = {}
    load, target = os.getloadavg()[0], os.environ.get(RESULTS)
    yield rows
    if target and rows:
        times = {"began": psutil.Process().create_time(), "ended": time.time(), "date": time.strftime("%F")}
        results = {"rows": rows, "cores": os.cpu_count(), "load": load, **times}
        Path(target, f"{uuid.uuid4().hex}.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Results:
    """What all processes measured; rows in the order of the lists of faults, then by name."""
    parts = sorted((json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")), key=lambda part: float(part["began"]))
    if not parts:
        raise SystemExit(f"{folder} holds no results: run the tests with {RESULTS}={folder}")
    rows: Figures = {}
    for part in parts:
        rows |= part["rows"]
    order = sorted(rows, key=lambda name: (_NAMES.index(name) if name in _NAMES else len(_NAMES), name))
    return {**parts[0], "rows": {name: rows[name] for name in order}, "ended": max(part["ended"] for part in parts)}


def table(results: Results) -> str:
    """Markdown: one row a fault, an empty cell for what a fault does not have; below it how it was measured, and goals that were missed."""
    rows = list(results["rows"].values())
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *(_row(found) for found in rows), ""]
    missed = [found["what"] for found in rows if found.get("goal_s") is not None and _both(found) > found["goal_s"]]
    lines.append(f"- Goals missed: {'; '.join(missed) or 'none'}.")
    minutes = (results["ended"] - results["began"]) / 60
    lines.append(
        f"- Measured on {results['date']} in {minutes:.1f} minutes in all, on {results['cores']} cores with a load of "
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
    write(read(Path(sys.argv[1])), Path(sys.argv[2]))
