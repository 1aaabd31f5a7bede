"""What all ranks told of themselves, drawn: a step's time by part, and peak memory beside its estimate."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from megavlm.tracking.metrics import decode_line
from megavlm.tracking.timeline import COLOURS

_MARK = '"memory": {'
"""In the lines of records in which all ranks tell of themselves, one in some tracking.log_every_steps."""
_OUTLIER = 3.0
"""Times the median: taller steps (a compilation, a stall) are cut off, or they would flatten all others."""

Records = Sequence[Mapping[str, Any]]


def read_of_ranks(path: Path, most: int) -> list[dict[str, Any]]:
    """Records of metrics.jsonl in which all ranks tell of themselves; of more than `most` every k-th."""
    found: list[dict[str, Any]] = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if _MARK in line and line.endswith("\n"):
                found.append(decode_line(line))
    return found[:: max(1, -(-len(found) // most))]


def draw_times(axis: Any, records: Records, firsts: Mapping[str, int]) -> None:
    """Seconds of a step, one part above another; each record stands for the steps since the one before."""
    used = [part for part in COLOURS if any(r.get("all_ranks_time_s", {}).get(part) for r in records)]
    totals: list[float] = []
    for number, (stage, found) in enumerate(_by_stage(records, "all_ranks_time_s")):
        # The first record's steps reach back to the stage's first.
        steps = [firsts.get(stage, found[0]["step"]) - 0.5, *(r["step"] + 0.5 for r in found)]
        rows = [[r["all_ranks_time_s"][part] for r in found] for part in used]
        axis.stackplot(
            steps,
            [[row[0], *row] for row in rows],
            labels=[part.replace("_", " ") for part in used] if number == 0 else (),
            colors=[COLOURS[part] for part in used],
            step="pre",
            linewidth=0,
        )
        totals += [sum(column) for column in zip(*rows, strict=True)]
    usual = [t for t in totals if t <= _OUTLIER * statistics.median(totals)]
    axis.set_ylim(0, 1.08 * max(usual))
    axis.set_ylabel("s a step" + (" (outliers cut)" if len(usual) < len(totals) else ""))


def draw_memory(axis: Any, records: Records, _: Mapping[str, int]) -> None:
    """The highest peak of a rank, the lowest, and what was estimated for the rank of the highest."""
    most = max(max(r["memory"]["peak_bytes"], r["memory"]["estimated_bytes"]) for r in records if "memory" in r)
    unit, name = (2**30, "GiB") if most >= 2**30 else (2**20, "MiB")
    lines = (
        ("peak_bytes", "highest rank", "-", "C0"),
        ("least_peak_bytes", "lowest rank", "-", "0.6"),
        ("estimated_bytes", "estimate", "--", "C3"),
    )
    for number, (_stage, found) in enumerate(_by_stage(records, "memory")):
        steps = [r["step"] for r in found]
        for key, label, style, colour in lines:
            values = [r["memory"][key] / unit for r in found]
            axis.plot(
                steps, values, linestyle=style, marker="." if len(found) < 40 else "", color=colour, label=label if number == 0 else None
            )
    axis.set_ylim(bottom=0)
    axis.set_ylabel(f"peak memory, {name}")


def _by_stage(records: Records, key: str) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """(stage, its records that have `key`), in order."""
    for stage, found in groupby((r for r in records if key in r), key=lambda r: str(r.get("stage", ""))):
        yield stage, list(found)
