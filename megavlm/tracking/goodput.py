"""Effective training time: seconds in steps that were kept over seconds since the run's first start, all restarts included. No torch."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]

from megavlm.tracking.metrics import METRICS_FILE, each_record

FIRST_START_FILE = "first_start"
"""In the run's folder: seconds since 1970."""


class Goodput(NamedTuple):
    """Of a run, so far."""

    kept_s: float
    """In steps that updated the weights and were not lost to a restart or a rollback."""
    elapsed_s: float
    """Since the first start, with everything that is no step: start-up, evaluations, saves, failures, waiting for a place in the queue."""
    last_step: int = 0

    @property
    def share(self) -> float:
        """Effective training time, of 1."""
        return min(1.0, self.kept_s / max(self.elapsed_s, 1e-9))

    @property
    def values(self) -> dict[str, float]:
        """For records."""
        return {"share": self.share, "kept_s": self.kept_s, "elapsed_s": self.elapsed_s}

    def __str__(self) -> str:
        return f"{100 * self.share:.1f} %: {self.kept_s:.1f} s of {self.elapsed_s:.1f} s since the first start in steps that were kept"


class GoodputMeter:
    """Of the run that is under way; records of earlier starts are counted when it is made.

    Args:
        run_dir: its folder, whose metrics.jsonl holds kept steps only.
        begun: seconds since 1970 at which this start began, should it be the first; default: when this process did.
    """

    def __init__(self, run_dir: str | Path, begun: float | None = None) -> None:
        self._run_dir = Path(run_dir)
        first = first_start(self._run_dir)
        if first is None:
            first = psutil.Process().create_time() if begun is None else begun
            _write(self._run_dir / FIRST_START_FILE, f"{first:.3f}\n")
        self.first_start = first
        self._steps = _Steps(0.0, 0)
        self.recount()

    def recount(self) -> None:
        """Steps were cut from metrics.jsonl."""
        self._steps = _count(self._run_dir)

    def add(self, record: Mapping[str, Any]) -> None:
        """A step was made."""
        self._steps = _Steps(self._steps.kept_s + _kept_s(record), record["step"])

    def now(self) -> Goodput:
        """So far."""
        return Goodput(self._steps.kept_s, time.time() - self.first_start, self._steps.last)


def measure(run_dir: str | Path, begun: float | None = None, until: float | None = None) -> Goodput | None:
    """Of the run in a folder; None before its first step.

    Args:
        begun: seconds since 1970 at which it was started, where somebody knows of an earlier time than the run itself.
        until: when it ended; default: now.
    """
    steps = _count(run_dir)
    if not steps.last:
        return None
    known = [start for start in (begun, first_start(Path(run_dir))) if start is not None]
    end = time.time() if until is None else until
    return Goodput(steps.kept_s, end - min(known, default=end - steps.kept_s), steps.last)


class _Steps(NamedTuple):
    kept_s: float
    last: int


def _count(run_dir: str | Path) -> _Steps:
    """The steps in a run's metrics.jsonl. One that is there twice counts once, one that updated nothing not at all."""
    if not (Path(run_dir) / METRICS_FILE).exists():
        return _Steps(0.0, 0)
    seconds = {int(record["step"]): _kept_s(record) for record in each_record(run_dir)}
    return _Steps(sum(seconds.values()), max(seconds, default=0))


def first_start(run_dir: Path) -> float | None:
    """Seconds since 1970; None where the run has not begun."""
    with contextlib.suppress(OSError, ValueError):
        return float((run_dir / FIRST_START_FILE).read_text(encoding="utf-8"))
    # A run from before that file was written: every start left a report.
    reports = [path.stat().st_mtime for path in run_dir.glob("environment*.json")]
    return min(reports, default=None)


def _kept_s(record: Mapping[str, Any]) -> float:
    return 0.0 if "skipped" in record else float(record.get("step_time_s", 0.0))


def _write(path: Path, text: str) -> None:
    with contextlib.suppress(OSError):  # a full disk: the next start will be taken for the first
        partial = path.with_name(f"{path.name}.new")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
