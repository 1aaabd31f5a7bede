"""When each pipeline rank does what: megatron-core's 1F1B and interleaved schedules, played with any costs.

The order of a rank's passes is fixed by the schedule (Narayanan et al. 2021, arXiv 2104.04473, section 2.2; megatron-core,
`schedules.get_pp_rank_microbatches` and `get_schedule_table`); each pass starts as soon as its rank is free and what it needs has
arrived. So a simulated step shows what microbatches of unequal cost and stages of unequal depth do to each other, which no closed form
does. With equal costs the idle share is the known one: (p - 1) / (v m + p - 1) for p ranks, v chunks and m microbatches.

Costs may be in any unit (seconds, FLOPs); times come out in the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Pass(NamedTuple):
    """One chunk's forward or backward of one microbatch."""

    forward: bool
    chunk: int
    microbatch: int


class Interval(NamedTuple):
    """A pass on a rank, from `start` to `stop`."""

    rank: int
    work: Pass
    start: float
    stop: float


@dataclass(frozen=True)
class Timeline:
    """A step as the schedule plays it."""

    intervals: tuple[Interval, ...]
    """Rank by rank, each in order of time."""
    num_ranks: int

    @property
    def step_time(self) -> float:
        """From the first pass's start to the last one's end."""
        return max(interval.stop for interval in self.intervals)

    @property
    def busy(self) -> list[float]:
        """Time that each rank works."""
        times = [0.0] * self.num_ranks
        for interval in self.intervals:
            times[interval.rank] += interval.stop - interval.start
        return times

    @property
    def bubble_share(self) -> float:
        """Idle share of all ranks' time in the step, 0 to 1: waiting for the pipeline to fill and to drain, and for slower stages."""
        total = self.step_time * self.num_ranks
        return 1.0 - sum(self.busy) / total if total else 0.0

    def of_rank(self, rank: int) -> list[Interval]:
        """What one rank does, in order."""
        return [interval for interval in self.intervals if interval.rank == rank]


def pass_order(rank: int, pipeline: int, virtual_pipeline: int, num_microbatches: int, *, forward_only: bool = False) -> list[Pass]:
    """A rank's passes, in megatron-core's order.

    1F1B: pipeline - rank - 1 forward passes to fill the pipeline, then a forward and a backward in turn. Interleaved: microbatches go
    in groups of `pipeline` through chunk 0, then chunk 1, ...; 2 (pipeline - rank - 1) + (virtual_pipeline - 1) pipeline passes fill it.

    Raises:
        ValueError: a rank outside the pipeline; with several chunks, microbatches that are no multiple of the pipeline.
    """
    if not 0 <= rank < pipeline:
        raise ValueError(f"pipeline rank {rank} is outside a pipeline of {pipeline}")
    if virtual_pipeline > 1 and num_microbatches % pipeline:
        raise ValueError(f"{num_microbatches} microbatches are no multiple of a pipeline of {pipeline}, which interleaved chunks need")
    group = pipeline if virtual_pipeline > 1 else num_microbatches
    forwards = [
        (chunk, microbatch)
        for first in range(0, num_microbatches, group)
        for chunk in range(virtual_pipeline)
        for microbatch in range(first, first + group)
    ]
    order = [Pass(True, chunk, microbatch) for chunk, microbatch in forwards]
    if forward_only:
        return order
    backwards = [Pass(False, virtual_pipeline - 1 - chunk, microbatch) for chunk, microbatch in forwards]
    filling = pipeline - rank - 1
    if virtual_pipeline > 1:
        filling = 2 * filling + (virtual_pipeline - 1) * pipeline
    filling = min(filling, len(order))
    steady = [work for pair in zip(order[filling:], backwards, strict=False) for work in pair]
    return [*order[:filling], *steady, *backwards[len(order) - filling :]]


def simulate(
    forward: Sequence[Sequence[float]],
    backward: Sequence[Sequence[float]] | None,
    *,
    pipeline: int,
    message: float = 0.0,
) -> Timeline:
    """One step. `forward[depth][microbatch]` and `backward` are costs of each chunk, from the bottom of the model to its top; chunk
    `depth` lives on rank depth % pipeline. `backward=None`: forward passes only. `message`: time that hidden states or their gradients
    take from one chunk to the next; the ranks go on working meanwhile.

    Raises:
        ValueError: chunks that are no multiple of the pipeline, chunks with other numbers of microbatches, or as `pass_order`.
    """
    depths, num_microbatches = len(forward), len(forward[0]) if forward else 0
    tables = [forward] if backward is None else [forward, backward]
    if not depths or depths % pipeline or any(len(table) != depths for table in tables):
        raise ValueError(f"{[len(table) for table in tables]} chunks do not spread over a pipeline of {pipeline}")
    if not num_microbatches or any(len(row) != num_microbatches for table in tables for row in table):
        raise ValueError("every chunk needs the cost of every microbatch, and there must be one")
    virtual = depths // pipeline
    orders = [pass_order(rank, pipeline, virtual, num_microbatches, forward_only=backward is None) for rank in range(pipeline)]
    done: dict[tuple[bool, int, int], float] = {}
    free, position = [0.0] * pipeline, [0] * pipeline
    intervals: list[list[Interval]] = [[] for _ in range(pipeline)]
    while any(position[rank] < len(orders[rank]) for rank in range(pipeline)):
        progressed = False
        for rank, order in enumerate(orders):
            while position[rank] < len(order):
                work = order[position[rank]]
                depth = work.chunk * pipeline + rank
                needed = _needed(work, depth, depths)
                if needed is not None and needed not in done:
                    break
                # What the same rank made needs no message; with one rank all chunks are its own.
                travel = message if needed is not None and needed[1] % pipeline != rank else 0.0
                start = max(free[rank], 0.0 if needed is None else done[needed] + travel)
                cost = (forward if work.forward or backward is None else backward)[depth][work.microbatch]
                free[rank] = done[work.forward, depth, work.microbatch] = start + cost
                intervals[rank].append(Interval(rank, work, start, start + cost))
                position[rank] += 1
                progressed = True
        assert progressed, "the schedule waits for itself"
    return Timeline(tuple(interval for rank in intervals for interval in rank), pipeline)


def _needed(work: Pass, depth: int, depths: int) -> tuple[bool, int, int] | None:
    """What has to be done before a pass: the same microbatch one chunk below, on the way back one above."""
    if work.forward:
        return (True, depth - 1, work.microbatch) if depth else None
    return (False, depth + 1, work.microbatch) if depth < depths - 1 else (True, depth, work.microbatch)


def even_bubble_share(pipeline: int, virtual_pipeline: int, num_microbatches: int) -> float:
    """Idle share with chunks and microbatches of equal cost: (p - 1) / (v m + p - 1)."""
    return (pipeline - 1) / (virtual_pipeline * num_microbatches + pipeline - 1)


def most_in_flight(order: Sequence[Pass], weights: Sequence[float]) -> float:
    """Most that waits for its backward pass at a time, where a forward pass of chunk i leaves `weights[i]` behind."""
    most = now = 0.0
    for work in order:
        now += weights[work.chunk] if work.forward else -weights[work.chunk]
        most = max(most, now)
    return most
