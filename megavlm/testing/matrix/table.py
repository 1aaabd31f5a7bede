"""The table of docs/reliability.md from what was measured: `python -m megavlm.testing.matrix.table RESULTS.json docs/reliability.md`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.testing.page import arguments, put_between

BEGIN, END = "<!-- table: made by `make faults` -->", "<!-- end of table -->"
COLUMNS = ("what happens", "exit code", "noticed after", "first new step after", "steps made again", "losses")
Figures = dict[str, dict[str, Any]]
Results = Mapping[str, Mapping[str, Any]]
"""Fault -> what was measured."""


def table(results: Results) -> str:
    """Markdown: one row a fault; an empty cell is something that the fault does not have."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *(_row(found) for found in results.values())])


def _row(found: Mapping[str, Any]) -> str:
    cells = [found["what"], _text(found.get("code")), _seconds(found, "detect_s"), _seconds(found, "resume_s"), _text(found.get("lost"))]
    return "| " + " | ".join([*cells, _text(found.get("loss"))]) + " |"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _seconds(found: Mapping[str, Any], name: str) -> str:
    return "" if found.get(name) is None else f"{found[name]:.1f} s"


def write(results: Results, page: Path) -> None:
    """Put the table between the page's two marks."""
    put_between(BEGIN, END, table(results), page)


if __name__ == "__main__":
    write(*arguments())
