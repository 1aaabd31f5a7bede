"""One stage's data on one rank: plans steps, materialises this rank's packs ahead of time, hands them out in order."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, cast

import torch

from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.bad_samples import BadSampleCounter
from megavlm.data.index import SampleIndex
from megavlm.data.materialise import Materialiser
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.types import PackedBatch, PackPlan, StepData, StepPlan
from megavlm.data.workers import WorkerPool, WorkerSetup

_Pending = tuple[StepPlan, list["Future[PackedBatch]"]]


class Planner(Protocol):
    """What the loader asks of megavlm.data.plan.StepPlanner."""

    def next(self) -> StepPlan:
        """Plan of the next step."""


class StageData:
    """Steps of one stage for one data-parallel rank.

    Steps are planned on one thread and their microbatches materialised by data.num_workers workers (threads or processes, as
    data.workers says), data.prefetch_steps steps ahead and never more; results come out in plan order, so the number and kind of
    workers change nothing but time. With num_workers=0 everything happens in `next`. An exception of any worker is raised by the
    `next` whose step it hit. For a CUDA `device` batches lie in pinned memory, so that their copies need not be waited for.

    Every rank that shares data (tensor, pipeline and context ranks of one data-parallel rank) must build it with the same
    arguments but `needs_tiles`, `check_images` and `log_bad_samples`.

    Args:
        planner: plans steps; only this object calls its `next`.
        dp_rank: which row of StepPlan.assignment is ours.
        needs_tiles: this rank holds the vision encoder.
        check_images: find out which pictures are readable even without the encoder; needed where the loss is computed.
        log_bad_samples: write run.dir/bad_samples.jsonl; switch on for one rank of each data-parallel rank.
        device: where the batches will go, and where threads may decode (worker processes decode on the CPU).
        sum_over_ranks: sums a number over all ranks, which call it once in every `next`; then unreadable samples are counted over
            the global batch and all ranks stop together. None: only this process's samples count.

    Raises:
        BadDataError: from `next`, when more than data.max_bad_fraction of the samples were unreadable (see BadSampleCounter), or when
            a sample ends every worker process that reads it.
        WorkerError: from `next`, when worker processes cannot be started.
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
        sum_over_ranks: Callable[[int], int] | None = None,
    ) -> None:
        self._planner, self._dp_rank = planner, dp_rank
        self._ahead, workers = recipe.data.prefetch_steps, recipe.data.num_workers
        self._pins = torch.device(device).type == "cuda"
        self._pool: WorkerPool | None = None
        if recipe.data.workers == "processes" and workers:
            self._pool = WorkerPool(WorkerSetup(recipe, stage, dict(indexes), tokenizer.fingerprint, needs_tiles, check_images))
        self._materialise: Callable[[Sequence[PackPlan]], PackedBatch] = self._pool or Materialiser(
            recipe, stage, indexes, tokenizer, needs_tiles=needs_tiles, check_images=check_images, device=device
        )
        log_file = Path(recipe.run.dir) / "bad_samples.jsonl" if log_bad_samples else None
        self._bad = BadSampleCounter(recipe.data.max_bad_fraction, dp_rank, log_file, sum_over_ranks, speaks=log_bad_samples)
        self._cursor: dict[str, object] | None = None
        self._planning = ThreadPoolExecutor(1, thread_name_prefix="plan") if workers else None
        self._working = ThreadPoolExecutor(workers, thread_name_prefix="data") if workers else None
        self._pending: deque[Future[_Pending]] = deque()

    @property
    def num_worker_restarts(self) -> int:
        """Worker processes that died and were replaced."""
        return self._pool.num_restarts if self._pool else 0

    @property
    def worker_process_ids(self) -> list[int]:
        """Of the worker processes that live; started with the first step."""
        return self._pool.process_ids if self._pool else []

    @property
    def cursor(self) -> dict[str, object] | None:
        """State from which the step after the last one handed out is planned; None before the first."""
        return self._cursor

    def next(self) -> StepData:
        """This rank's microbatches of the next step. Raises what planning or materialising raised, StopIteration included."""
        start = time.perf_counter()
        if self._planning is None:
            plan = self._planner.next()
            batches = [self._load(packs) for packs in plan.assignment[self._dp_rank]]
        else:
            while len(self._pending) <= self._ahead:
                self._pending.append(self._planning.submit(self._begin_step))
            plan, futures = self._pending.popleft().result()
            batches = [f.result() for f in futures]
        wait_s = time.perf_counter() - start
        self._bad.count(plan, batches)
        self._cursor = plan.cursor_after
        return StepData(microbatches=batches, plan=plan, wait_s=wait_s)

    def _begin_step(self) -> _Pending:
        assert self._working is not None
        plan = self._planner.next()
        return plan, [self._working.submit(self._load, packs) for packs in plan.assignment[self._dp_rank]]

    def _load(self, packs: Sequence[PackPlan]) -> PackedBatch:
        batch = self._materialise(packs)
        return pinned(batch) if self._pins else batch

    def close(self) -> None:
        """Drop what was prefetched and end threads and processes. May be called twice."""
        if self._planning is None or self._working is None:
            return
        for future in self._pending:
            future.cancel()
        self._planning.shutdown(wait=True, cancel_futures=True)
        self._working.shutdown(wait=False, cancel_futures=True)
        if self._pool is not None:
            self._pool.close()
        self._working.shutdown(wait=True)
        self._pending.clear()

    def __enter__(self) -> StageData:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def pinned(batch: PackedBatch) -> PackedBatch:
    """Copy with every tensor in page-locked memory, from which a GPU copies while the host goes on."""
    moved = {f.name: v.pin_memory() for f in fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}
    return replace(batch, **cast(dict[str, Any], moved))
