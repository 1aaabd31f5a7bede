"""Which rank keeps the others waiting: its own work of a step beside that of the ranks that do the same. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any, NamedTuple

from megavlm.tracking.ranks import RankReport

WAITING = ("communication", "pipeline")
"""Parts of a step in which a rank waits for others; all else is its own work, waiting for its data included."""


class Straggler(NamedTuple):
    """A rank that was slow in several reports in a row."""

    rank: int
    skew: float
    """Its own work / the median's."""
    text: str
    """For people."""


class StragglerWatch:
    """Told of every report. Ranks are compared within their pipeline stage, since stages have different work.

    Args:
        factor: own work / median from which on a rank is slow.
        num_reports: in a row, before it is named; once, until a report in which it is not slow.
        where: rank -> its host and device, for people.
    """

    def __init__(self, factor: float, num_reports: int, where: Mapping[int, str]) -> None:
        self._factor, self._num_reports, self._where = factor, num_reports, where
        self._in_a_row: dict[int, int] = {}

    def look(self, reports: Sequence[RankReport]) -> tuple[dict[str, Any], list[Straggler]]:
        """(`straggler` of metrics.jsonl: the highest skew and whose it is; ranks to be named now). Empty where nobody can be compared."""
        stages: dict[int, list[RankReport]] = {}
        for report in reports:
            if report.time_s is not None:
                stages.setdefault(report.place["pipeline"], []).append(report)
        skews: dict[int, float] = {}
        named = []
        for group in stages.values():
            usual = median_low([_own_work(r) for r in group])
            if len(group) < 2 or usual <= 0:
                continue
            for report in group:
                skew = skews[report.rank] = _own_work(report) / usual
                number = self._in_a_row[report.rank] = self._in_a_row.get(report.rank, 0) + 1 if skew > self._factor else 0
                if number == self._num_reports:
                    named.append(Straggler(report.rank, skew, self._describe(report, group, usual)))
        if not skews:
            return {}, []
        slowest = max(skews, key=lambda rank: skews[rank])
        return {"skew": skews[slowest], "rank": slowest}, named

    def _describe(self, report: RankReport, group: Sequence[RankReport], usual: float) -> str:
        assert report.time_s is not None
        excess = {
            part: seconds - median_low([_times(r)[part] for r in group]) for part, seconds in report.time_s.items() if part not in WAITING
        }
        part = max(excess, key=lambda name: excess[name])
        own = _own_work(report)
        return (
            f"rank {report.rank} ({self._where.get(report.rank, 'unknown')}) keeps the others waiting: {own:.3g} s of its own work a step, "
            f"{own / usual:.1f} times the {usual:.3g} s of the median rank of its stage, most of the difference in "
            f"{part.replace('_', ' ')}; {self._num_reports} reports in a row"
        )


def _times(report: RankReport) -> Mapping[str, float]:
    return report.time_s or {}


def _own_work(report: RankReport) -> float:
    """Seconds of a step."""
    return sum(seconds for part, seconds in _times(report).items() if part not in WAITING)
