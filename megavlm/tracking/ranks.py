"""What each rank of a stage needed: time by part of a step, and the most memory beside the estimate. Imports no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RANKS_FILE = "ranks.json"
_SMALLEST_SHARE = 0.005
"""Of a step: smaller parts are left out of the line for people."""


@dataclass(frozen=True)
class RankReport:
    """One rank's."""

    rank: int
    place: Mapping[str, int]
    """Axis -> its place there."""
    peak_bytes: int
    estimated_bytes: Mapping[str, int]
    """Part (weights, activations, ...) -> bytes that the planner expected."""
    reserved_bytes: int | None = None
    """What a GPU's allocator took from the device; None on a CPU."""
    time_s: Mapping[str, float] | None = None
    """Part of a step -> mean seconds; None where steps are not taken apart."""

    @property
    def total_estimated_bytes(self) -> int:
        return sum(self.estimated_bytes.values())

    def as_dict(self) -> dict[str, Any]:
        """For ranks.json."""
        reserved = {} if self.reserved_bytes is None else {"reserved_bytes": self.reserved_bytes}
        return {
            "rank": self.rank,
            **self.place,
            "peak_bytes": self.peak_bytes,
            **reserved,
            "estimated_bytes": {**self.estimated_bytes, "total": self.total_estimated_bytes},
            **({} if self.time_s is None else {"time_s": dict(self.time_s)}),
        }


def highest(reports: Sequence[RankReport]) -> RankReport:
    """The rank that needed the most memory."""
    return max(reports, key=lambda r: r.peak_bytes)


def memory_record(reports: Sequence[RankReport]) -> dict[str, Any]:
    """`memory` of metrics.jsonl: the highest peak, whose it is, what was estimated for that rank, and the lowest peak."""
    most = highest(reports)
    reserved = {} if most.reserved_bytes is None else {"reserved_bytes": most.reserved_bytes}
    return {
        "peak_bytes": most.peak_bytes,
        "peak_rank": most.rank,
        **reserved,
        "estimated_bytes": most.total_estimated_bytes,
        "least_peak_bytes": min(r.peak_bytes for r in reports),
    }


def memory_line(reports: Sequence[RankReport]) -> str:
    """The same for people."""
    most, least = highest(reports), min(reports, key=lambda r: r.peak_bytes)
    where = ""
    if len(reports) > 1:
        where = f" on rank {most.rank} (least: {size(least.peak_bytes)} on rank {least.rank})"
    if most.reserved_bytes is None:
        kept = ", with data and Python"
    else:
        kept = f", {size(most.reserved_bytes)} with what the allocator keeps"
    return f"peak memory of training {size(most.peak_bytes)}{where}{kept}; estimated for tensors {size(most.total_estimated_bytes)}"


def mean_times(reports: Sequence[RankReport]) -> dict[str, float]:
    """Part of a step -> mean seconds over ranks; empty where steps are not taken apart."""
    times = [r.time_s for r in reports if r.time_s is not None]
    return {part: sum(t[part] for t in times) / len(times) for part in times[0]} if times else {}


def time_line(times: Mapping[str, float], num_ranks: int) -> str:
    """Shares of a step for people, the largest first."""
    total = sum(times.values())
    parts = sorted(((seconds / total, part) for part, seconds in times.items() if seconds >= _SMALLEST_SHARE * total), reverse=True)
    shares = ", ".join(f"{part.replace('_', ' ')} {100 * share:.0f} %" for share, part in parts)
    return f"a step of {total:.3g} s{f', mean of {num_ranks} ranks' if num_ranks > 1 else ''}: {shares}"


def write_ranks(run_dir: Path, stage: str, reports: Sequence[RankReport]) -> Path:
    """Put the stage's reports into ranks.json, whose other stages stay; returns its path."""
    path = run_dir / RANKS_FILE
    stages: dict[str, Any] = {}
    if path.exists():
        try:
            stages = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # edited by hand
            stages = {}
    stages[stage] = [r.as_dict() for r in reports]
    replacement = path.with_suffix(".new")
    replacement.write_text(json.dumps(stages, indent=1) + "\n", encoding="utf-8")
    os.replace(replacement, path)
    return path


def size(number: int) -> str:
    """Bytes for people, in MiB or GiB."""
    return f"{number / 2**20:.0f} MiB" if number < 2**30 else f"{number / 2**30:.2f} GiB"
