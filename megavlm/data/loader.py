"""One stage's data on one rank: plans steps, materialises this rank's packs ahead of time, hands them out in order."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch

from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.index import SampleIndex
from megavlm.data.materialise import Materialiser
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.types import PackedBatch, StepData, StepPlan

_MIN_JUDGED_SAMPLES = 1000
_Pending = tuple[StepPlan, list["Future[PackedBatch]"]]


class BadDataError(ValueError):
    """More samples could not be read than data.max_bad_fraction allows."""


class Planner(Protocol):
    """What the loader asks of megavlm.data.plan.StepPlanner."""

    def next(self) -> StepPlan:
        """Plan of the next step."""


class StageData:
    """Steps of one stage for one data-parallel rank.

    Steps are planned on one thread and their microbatches materialised on data.num_workers threads, data.prefetch_steps steps
    ahead and never more; results come out in plan order, so the number of workers changes nothing but time. With num_workers=0
    everything happens in `next`. An exception of any thread is raised by the `next` whose step it hit.

    Every rank that shares data (tensor, pipeline and context ranks of one data-parallel rank) must build it with the same
    arguments but `needs_tiles`, `check_images` and `log_bad_samples`.

    Args:
        planner: plans steps; only this object calls its `next`.
        dp_rank: which row of StepPlan.assignment is ours.
        needs_tiles: this rank holds the vision encoder.
        check_images: find out which pictures are readable even without the encoder; needed where the loss is computed.
        log_bad_samples: write run.dir/bad_samples.jsonl; switch on for one rank of each data-parallel rank.
        device: where the decoder may run.

    Raises:
        BadDataError: from `next`, when more than data.max_bad_fraction of this process's samples were unreadable. Judged as if at
            least 1000 samples had been seen, so that a single early one does not end a run (0 stops at the first). Ranks of one
            data-parallel rank see the same samples and stop at the same step; other ranks are ended by the launcher.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        indexes: Mapping[str, SampleIndex],
        tokenizer: Tokenizer,
        planner: Planner,
        dp_rank: int,
        needs_tiles: bool,
        *,
        check_images: bool = True,
        log_bad_samples: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self._materialise = Materialiser(
            recipe, stage, indexes, tokenizer, needs_tiles=needs_tiles, check_images=check_images, device=device
        )
        self._planner, self._dp_rank = planner, dp_rank
        self._ahead = recipe.data.prefetch_steps
        self._max_bad_fraction = recipe.data.max_bad_fraction
        self._log_file = Path(recipe.run.dir) / "bad_samples.jsonl" if log_bad_samples else None
        self._num_samples = self._num_bad = 0
        self._cursor: dict[str, object] | None = None
        workers = recipe.data.num_workers
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="plan") if workers else None
        self._working = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None
        self._pending: deque[Future[_Pending]] = deque()

    @property
    def cursor(self) -> dict[str, object] | None:
        """State from which the step after the last one handed out is planned; None before the first."""
        return self._cursor

    def next(self) -> StepData:
        """This rank's microbatches of the next step. Raises what planning or materialising raised, StopIteration included."""
        start = time.perf_counter()
        if self._planning is None:
            plan = self._planner.next()
            batches = [self._materialise(packs) for packs in plan.assignment[self._dp_rank]]
        else:
            while len(self._pending) <= self._ahead:
                self._pending.append(self._planning.submit(self._begin_step))
            plan, futures = self._pending.popleft().result()
            batches = [f.result() for f in futures]
        self._account(plan, batches)
        self._cursor = plan.cursor_after
        return StepData(microbatches=batches, plan=plan, wait_s=time.perf_counter() - start)

    def _begin_step(self) -> _Pending:
        assert self._working is not None
        plan = self._planner.next()
        return plan, [self._working.submit(self._materialise, packs) for packs in plan.assignment[self._dp_rank]]

    def _account(self, plan: StepPlan, batches: list[PackedBatch]) -> None:
        self._num_samples += sum(sum(s is not None for s in b.segment_samples) for b in batches)
        bad = [record for b in batches for record in b.metadata["bad_samples"]]  # type: ignore[attr-defined]
        if not bad:
            return
        self._num_bad += len(bad)
        if self._log_file is not None:
            self._log_file.parent.mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps({"step": plan.step, "dp_rank": self._dp_rank, **record}) + "\n" for record in bad)
            file = os.open(self._log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:  # one append per step: lines of several ranks never mix
                os.write(file, lines.encode())
            finally:
                os.close(file)
        if self._num_bad > self._max_bad_fraction * max(self._num_samples, _MIN_JUDGED_SAMPLES):
            last = bad[-1]
            raise BadDataError(
                f"{self._num_bad} of {self._num_samples} samples so far could not be read, more than data.max_bad_fraction="
                f"{self._max_bad_fraction} (of at least {_MIN_JUDGED_SAMPLES}). The last: source {last['source']!r}, sample"
                f" {last['key']!r}: {last['reason']}. See bad_samples.jsonl in run.dir; repair the data or raise the limit"
            )

    def close(self) -> None:
        """Drop what was prefetched and end the threads."""
        if self._planning is None or self._working is None:
            return
        for future in self._pending:
            future.cancel()
        self._planning.shutdown(wait=True, cancel_futures=True)
        self._working.shutdown(wait=True, cancel_futures=True)
        self._pending.clear()

    def __enter__(self) -> StageData:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
