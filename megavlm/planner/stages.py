"""Which layers belong on which pipeline stage, by what they cost: the split that makes the slowest stage as fast as can be.

A step of m microbatches through a pipeline takes about (m - 1) times its slowest stage plus one microbatch's way through all stages, and
that way is the same for every split. With one chunk a rank the least possible slowest stage is found exactly (linear partition). With
several chunks a rank's sum matters and so does each chunk, because ranks take turns chunk by chunk: splits are compared by playing the
schedule (planner.schedule).

Costs are FLOPs, forward and backward, of encoder and projector (before the first layer), each layer, and the head (behind the last).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

from megavlm.config.schema import DataConfig, ModelConfig, ParallelConfig, StageConfig
from megavlm.planner.flops import FlopsModel, VisionWork, Work
from megavlm.planner.pictures import copies_of_pictures
from megavlm.planner.recompute import NOTHING_AGAIN, Again, recomputed
from megavlm.planner.schedule import Timeline, even_bubble_share, simulate
from megavlm.topology.pipeline import PipelineError, PipelineSplit
from megavlm.topology.table import human_count, text_table

MOST_PASSES = 100_000
"""Passes that the search for a split with several chunks a rank may play: a second or less."""

Depths = Sequence[Work]
"""What one microbatch costs: before the LLM's layers, each layer, behind them."""


class PackShape(NamedTuple):
    """What of a pack costs anything."""

    lengths_tokens: Sequence[int]
    vision: VisionWork
    num_targets: int


ONE_COPY: Mapping[str, int] = {}


def microbatch_cost(
    flops: FlopsModel, packs: Iterable[PackShape], *, again: Again = NOTHING_AGAIN, copies: Mapping[str, int] = ONE_COPY
) -> list[Work]:
    """What ranks compute for the packs of a microbatch, by depth. `again`: what they compute twice. `copies`: how many of them do all of
    the same work, by part of the model (planner.pictures.copies_of_pictures)."""
    total: list[Work] = []
    for pack in packs:
        cost = pack_cost(flops, pack, again, copies)
        total = [a + b for a, b in zip(total, cost, strict=True)] if total else cost
    return total


def pack_cost(flops: FlopsModel, pack: PackShape, again: Again = NOTHING_AGAIN, copies: Mapping[str, int] = ONE_COPY) -> list[Work]:
    """The same of one pack."""
    cost = flops.by_depth(*pack)
    if again != NOTHING_AGAIN:
        extra = flops.recomputed(pack.lengths_tokens, pack.vision, again)
        cost = [Work(work.forward, work.backward + more) for work, more in zip(cost, extra, strict=True)]
    if any(number > 1 for number in copies.values()):
        projector = flops.pack((), pack.vision, 0).by_part.get("projector", Work())
        encoder = Work(cost[0].forward - projector.forward, cost[0].backward - projector.backward)
        cost[0] = encoder * copies.get("vision", 1) + projector * copies.get("projector", 1)
    return cost


def mean_cost(microbatches: Sequence[Depths]) -> list[Work]:
    """The mean of several microbatches, by depth; in whole FLOPs."""
    columns = zip(*microbatches, strict=True)
    return [
        Work(sum(w.forward for w in column) // len(microbatches), sum(w.backward for w in column) // len(microbatches))
        for column in columns
    ]


def typical_pack(model: ModelConfig, data: DataConfig) -> PackShape:
    """A pack to reckon with where no data are at hand: samples of one tile and as many text tokens, half of these targets."""
    visual = 0 if model.text_only else model.visual_tokens_per_tile
    length = min(2 * visual, data.seq_len_tokens) or data.seq_len_tokens
    lengths = [length] * (data.seq_len_tokens // length)
    text = sum(lengths) - visual * len(lengths)
    return PackShape(lengths, VisionWork.uniform(len(lengths) if visual else 0, model.vision.num_patches), max(text // 2, 1))


def chunk_costs(split: PipelineSplit, microbatches: Sequence[Depths]) -> tuple[list[list[float]], list[list[float]]]:
    """(forward, backward) of each chunk, from bottom to top, and each microbatch: what `simulate` takes."""
    bounds = list(accumulate(split.counts, initial=1))
    forward: list[list[float]] = []
    backward: list[list[float]] = []
    for depth in range(split.num_chunks):
        start = 0 if depth == 0 else bounds[depth]
        stop = bounds[depth + 1] + (1 if depth == split.num_chunks - 1 else 0)
        forward.append([float(sum(w.forward for w in cost[start:stop])) for cost in microbatches])
        backward.append([float(sum(w.backward for w in cost[start:stop])) for cost in microbatches])
    return forward, backward


def play(split: PipelineSplit, microbatches: Sequence[Depths]) -> Timeline:
    """The schedule of one step, in FLOPs."""
    return simulate(*chunk_costs(split, microbatches), pipeline=split.pipeline)


def balanced_split(cost: Depths, pipeline: int, virtual_pipeline: int = 1, num_microbatches: int = 1) -> PipelineSplit:
    """The split whose slowest stage is fastest, for microbatches that cost `cost` each.

    With one chunk a rank no split has a cheaper slowest stage; of those that are as good, the even one, else one with stages as equal as
    can be. With several chunks it is the best of those that were played: the one whose costliest chunk is cheapest, the one whose
    busiest rank has the least, what single moves of a layer make of the faster of the two, and the even one.

    Raises:
        PipelineError: fewer layers than the chunks between the first and the last one.
    """
    num_layers, chunks = len(cost) - 2, pipeline * virtual_pipeline
    if chunks == 1:
        return PipelineSplit(num_layers)
    check_spread(num_layers, pipeline, virtual_pipeline)
    best = PipelineSplit(num_layers, pipeline, virtual_pipeline, _equal_chunks(tuple(w.total for w in cost), chunks))
    even = None if num_layers % chunks else PipelineSplit(num_layers, pipeline, virtual_pipeline)
    if virtual_pipeline == 1:
        slowest = [max(chunk_totals(s, cost)) for s in (best, even) if s is not None]
        return even if even is not None and slowest[1] <= slowest[0] else best
    # As many microbatches as show the filling, the steady state and the draining.
    played = min(num_microbatches, 3 * pipeline)
    microbatches = [cost] * max(pipeline, played // pipeline * pipeline)
    return _search([best, _equal_ranks(best, cost)], even, microbatches)


def check_spread(num_layers: int, pipeline: int, virtual_pipeline: int) -> None:
    """Raises PipelineError when there are fewer layers than chunks that must have one."""
    chunks = pipeline * virtual_pipeline
    if num_layers < max(chunks - 2, 1):
        raise PipelineError(
            f"model.language.num_layers={num_layers} cannot be spread over parallel.pipeline={pipeline} x "
            f"parallel.virtual_pipeline={virtual_pipeline} = {chunks} chunks: only the first and the last may have no layer"
        )


def chunk_totals(split: PipelineSplit, cost: Depths) -> list[float]:
    """Forward + backward of each chunk, from bottom to top."""
    forward, backward = chunk_costs(split, [cost])
    return [f[0] + b[0] for f, b in zip(forward, backward, strict=True)]


def settled(
    parallel: ParallelConfig,
    model: ModelConfig,
    stage: StageConfig | None,
    data: DataConfig,
    num_microbatches: int,
    packs: Sequence[PackShape] = (),
) -> ParallelConfig:
    """`parallel` with parallel.split=balanced turned into layers_per_stage, for packs like `packs` (none: a typical one).

    Raises:
        PipelineError: as `balanced_split`.
    """
    if parallel.split != "balanced":
        return parallel
    if parallel.pipeline == 1:
        return parallel.model_copy(update={"split": "even"})
    flops = FlopsModel(model, stage)
    again, copies = recomputed(parallel, model), copies_of_pictures(model, parallel)
    shapes = packs or [typical_pack(model, data)]
    costs = [pack_cost(flops, pack, again, copies) for pack in shapes]
    split = balanced_split(mean_cost(costs), parallel.pipeline, parallel.virtual_pipeline, num_microbatches)
    return parallel.model_copy(update={"split": "even", "layers_per_stage": list(split.counts)})


def stage_table(split: PipelineSplit, ranks: Sequence[Sequence[Depths]]) -> str:
    """The split as text for --dry-run: each chunk's layers and FLOPs a microbatch, then the bubble to expect from these microbatches
    (`ranks`: those of each data-parallel rank in one step)."""
    microbatches = [microbatch for rank in ranks for microbatch in rank]
    cost = mean_cost(microbatches)
    totals = chunk_totals(split, cost)
    per_rank = [sum(totals[rank :: split.pipeline]) for rank in range(split.pipeline)]
    rows = []
    for depth, total in enumerate(totals):
        chunk, rank = divmod(depth, split.pipeline)
        whole = f"{100 * per_rank[rank] / max(*per_rank, 1):.0f} %" if chunk == 0 else ""
        rows.append((rank, chunk, split.layer_names(rank, chunk), human_count(round(total)), whole, split.also(rank, chunk)))
    header = ("pipeline rank", "chunk", "layers", "FLOPs", "of the busiest rank", "also")
    table = text_table(header, rows, "pipeline stages (mean FLOPs of a microbatch, forward and backward)")
    return f"{table}\n{_bubble_line(split, ranks)}"


def _bubble_line(split: PipelineSplit, ranks: Sequence[Sequence[Depths]]) -> str:
    """Ranks wait for the slowest pipeline at the end of a step; what they wait for counts."""
    timelines = [play(split, microbatches) for microbatches in ranks]
    step = max(timeline.step_time for timeline in timelines)
    busy = sum(sum(timeline.busy) for timeline in timelines)
    share = 1.0 - busy / (step * split.pipeline * len(timelines)) if step else 0.0
    least = even_bubble_share(split.pipeline, split.virtual_pipeline, len(ranks[0]))
    return (
        f"expected bubble: ranks idle {100 * share:.1f} % of a step of {len(ranks[0])} microbatches "
        f"({100 * least:.1f} % if all stages and microbatches cost the same)"
    )


def _equal_chunks(costs: tuple[int, ...], chunks: int) -> tuple[int, ...]:
    """Layers of each chunk so that the costliest is cheapest, then the sum of squares least; ends may have none, others at least one.

    `costs`: before, each layer, behind.
    """
    num_layers = len(costs) - 2
    sums = [0, *accumulate(costs[1:-1])]

    def load(chunk: int, start: int, stop: int) -> int:
        return sums[stop] - sums[start] + (costs[0] if chunk == 0 else 0) + (costs[-1] if chunk == chunks - 1 else 0)

    def stops(chunk: int, start: int) -> range:
        least = 0 if chunk == 0 else 1
        after = max(chunks - chunk - 2, 0)  # chunks between this and the last need a layer each
        return range(start + least, num_layers - after + 1)

    @cache
    def slowest(chunk: int, start: int) -> int:
        if chunk == chunks - 1:
            return load(chunk, start, num_layers)
        return min((max(load(chunk, start, stop), slowest(chunk + 1, stop)) for stop in stops(chunk, start)), default=1 << 200)

    limit = slowest(0, 0)

    @cache
    def most_equal(chunk: int, start: int) -> tuple[int, tuple[int, ...]]:
        if chunk == chunks - 1:
            own = load(chunk, start, num_layers)
            return (own * own if own <= limit else 1 << 200), (num_layers - start,)
        best: tuple[int, tuple[int, ...]] = (1 << 201, ())
        for stop in stops(chunk, start):
            own = load(chunk, start, stop)
            if own > limit:
                break
            squares, counts = most_equal(chunk + 1, stop)
            best = min(best, (own * own + squares, (stop - start, *counts)))
        return best

    return most_equal(0, 0)[1]


def _equal_ranks(first: PipelineSplit, cost: Depths) -> PipelineSplit:
    """From `first`, move layers one by one until no move makes ranks more equal, and of equal ranks the chunks."""
    best, score = first, _inequality(first, cost)
    while True:
        moved = [PipelineSplit(best.num_layers, best.pipeline, best.virtual_pipeline, counts) for counts in _neighbours(best.counts)]
        scores = [_inequality(split, cost) for split in moved]
        if not scores or min(scores) >= score:
            return best
        score = min(scores)
        best = moved[scores.index(score)]


def _inequality(split: PipelineSplit, cost: Depths) -> tuple[float, float, float]:
    """(busiest rank, squares over ranks, squares over chunks): less is more equal."""
    chunks = chunk_totals(split, cost)
    ranks = [sum(chunks[rank :: split.pipeline]) for rank in range(split.pipeline)]
    return max(ranks), sum(load * load for load in ranks), sum(load * load for load in chunks)


def _search(starts: Sequence[PipelineSplit], even: PipelineSplit | None, microbatches: Sequence[Depths]) -> PipelineSplit:
    """The fastest of `starts`, from which one layer at a time is moved from chunk to chunk for as long as the step gets shorter."""
    timed = [(play(split, microbatches).step_time, number) for number, split in enumerate(starts)]
    time, number = min(timed)
    best = starts[number]
    seen = {split.counts for split in starts}
    trials = MOST_PASSES // (2 * best.num_chunks * len(microbatches))
    improved = True
    while improved and trials:
        improved = False
        for counts in _neighbours(best.counts):
            if counts in seen:
                continue
            seen.add(counts)
            split = PipelineSplit(best.num_layers, best.pipeline, best.virtual_pipeline, counts)
            shorter, trials = play(split, microbatches).step_time, trials - 1
            if shorter < time:
                best, time, improved = split, shorter, True
                break
            if not trials:
                break
    if even is not None and play(even, microbatches).step_time <= time:
        return even
    return best


def _neighbours(counts: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Splits with one layer moved to another chunk, near chunks first."""
    last = len(counts) - 1
    for distance in range(1, len(counts)):
        for low in range(len(counts) - distance):
            for source, target in ((low, low + distance), (low + distance, low)):
                if counts[source] > (0 if source in (0, last) else 1):
                    moved = list(counts)
                    moved[source] -= 1
                    moved[target] += 1
                    yield tuple(moved)
