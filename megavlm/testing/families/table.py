"""The table of docs/families.md from what was measured: `python -m megavlm.testing.families.table RESULTS.json docs/families.md`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megavlm.testing.families import CASES
from megavlm.testing.families.case import Case
from megavlm.testing.page import arguments, put_between

BEGIN, END = "<!-- table: made by `make families` -->", "<!-- end of table -->"
Results = Mapping[str, Mapping[str, float]]
"""Case -> proof -> what was measured."""
DIFFERENCES = {
    "logits TP1": "logits",
    "logits TP2": "logits TP2",
    "logits PP2": "logits PP2",
    "packed": "packed = alone",
    "gradients": "gradient norms, 3 steps",
}


def table(results: Results) -> str:
    """Markdown: one row a case, one column a proof; an empty cell is a proof that did not run or failed."""
    columns = ["family", "class", "import = export", *DIFFERENCES.values(), "64 tokens, TP1 and TP2"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(_row(case, results.get(case.name, {})) for case in CASES)])


def _row(case: Case, found: Mapping[str, float]) -> str:
    tensors = f"{found['round trip']:.0f} tensors" if "round trip" in found else ""
    differences = [f"{found[proof]:.0e}" if proof in found else "" for proof in DIFFERENCES]
    same = "same" if {"generation TP1", "generation TP2"} <= found.keys() else ""
    return "| " + " | ".join([case.name, f"`{case.kind.hf_class}`", tensors, *differences, same]) + " |"


def write(results: Results, page: Path) -> None:
    """Put the table between the page's two marks."""
    put_between(BEGIN, END, table(results), page)


if __name__ == "__main__":
    write(*arguments())
