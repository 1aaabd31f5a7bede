"""Samples that could not be read: a line each, and the end of a run that loses too many."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megavlm.data.types import PackedBatch, StepPlan

log = logging.getLogger(__name__)

MIN_JUDGED_SAMPLES = 1000
"""A run is judged as if it had seen at least so many samples: a single early one does not end it."""


class BadDataError(ValueError):
    """More samples could not be read than data.max_bad_fraction allows, or one that ends every worker that reads it."""


class BadSampleCounter:
    """Counts unreadable samples, logs them, and stops the run when there are too many.

    Args:
        max_fraction: data.max_bad_fraction; 0 stops at the first.
        dp_rank: the data-parallel rank whose samples these are.
        log_file: where to append a JSON line per sample; None: nowhere.
        sum_over_ranks: adds up a number over all ranks of the run, called by all of them once a step; then shares are those of the
            global batch, and every rank stops at the same step, also one that reads no picture itself. None: this rank's alone.
        speaks: this rank's samples are part of that sum; true on one rank of each data-parallel rank.
    """

    def __init__(
        self,
        max_fraction: float,
        dp_rank: int,
        log_file: Path | None = None,
        sum_over_ranks: Callable[[int], int] | None = None,
        speaks: bool = True,
    ) -> None:
        self.num_samples = self.num_bad = 0
        self._max_fraction, self._dp_rank, self._log_file = max_fraction, dp_rank, log_file
        self._sum_over_ranks, self._speaks = sum_over_ranks, speaks
        self._last: dict[str, Any] | None = None
        self._next_warning = 1

    def count(self, plan: StepPlan, batches: Sequence[PackedBatch]) -> None:
        """Take in a step that is handed out.

        Raises:
            BadDataError: too many of the samples so far were unreadable.
        """
        bad: list[dict[str, Any]] = [record for b in batches for record in b.metadata["bad_samples"]]  # type: ignore[attr-defined]
        if bad:
            self._last = bad[-1]
            self._log(plan.step, bad)
        ranks, new = plan.assignment, len(bad)
        if self._sum_over_ranks is None:
            ranks = (plan.assignment[self._dp_rank],)
        else:
            new = self._sum_over_ranks(new if self._speaks else 0)
        self.num_samples += sum(len(pack.samples) for rank in ranks for microbatch in rank for pack in microbatch)
        self.num_bad += new
        if new and self.num_bad > self._max_fraction * max(self.num_samples, MIN_JUDGED_SAMPLES):
            raise BadDataError(self._message())
        if self.num_bad >= self._next_warning and self._last is not None and self._log_file is not None:
            # The first, and then whenever there are twice as many: never silent, and no flood.
            self._next_warning = 2 * self.num_bad
            log.warning(
                "%d of %d samples so far could not be read and do not count in the loss; the last: source %r, sample %r: %s. See %s",
                *(self.num_bad, self.num_samples, self._last["source"], self._last["key"], self._last["reason"], self._log_file),
            )

    def _message(self) -> str:
        last = self._last
        example = f" The last of this rank: source {last['source']!r}, sample {last['key']!r}: {last['reason']}." if last else ""
        return (
            f"{self.num_bad} of {self.num_samples} samples so far could not be read, more than data.max_bad_fraction="
            f"{self._max_fraction} (of at least {MIN_JUDGED_SAMPLES}).{example} See bad_samples.jsonl in run.dir; repair the data or raise"
            " the limit"
        )

    def _log(self, step: int, bad: Sequence[dict[str, Any]]) -> None:
        if self._log_file is None:
            return
        self._log_file.parent.mkdir(parents=True, exist_ok=True)
        lines = "".join(json.dumps({"step": step, "dp_rank": self._dp_rank, **record}) + "\n" for record in bad)
        file = os.open(self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:  # one append per step: lines of several ranks never mix
            os.write(file, lines.encode())
        finally:
            os.close(file)
