"""The simulated schedules against megatron-core's tables, closed forms and an independent longest path."""

from __future__ import annotations

import random
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from matplotlib.axes import Axes
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules

from megavlm.planner.schedule import Pass, even_bubble_share, most_in_flight, pass_order, simulate
from megavlm.planner.schedule_picture import draw_schedules

GRIDS = [(2, 1, 2), (2, 1, 7), (4, 1, 3), (4, 1, 8), (2, 2, 4), (4, 2, 8), (4, 3, 4), (3, 4, 9), (8, 2, 16)]


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), GRIDS)
def test_order_is_megatrons(pipeline: int, virtual: int, microbatches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: pipeline)
    monkeypatch.setattr(parallel_state, "get_virtual_pipeline_model_parallel_world_size", lambda: virtual if virtual > 1 else None)
    for rank in range(pipeline):
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda rank=rank: rank)
        _, _, filling, rest = schedules.get_pp_rank_microbatches(microbatches, virtual, pipeline)
        table = schedules.get_schedule_table(microbatches, virtual, pipeline) if virtual > 1 else [(m, 0) for m in range(microbatches)]
        forwards = [Pass(True, chunk, microbatch) for microbatch, chunk in table]
        backwards = [Pass(False, virtual - 1 - chunk, microbatch) for microbatch, chunk in table]
        expected = forwards[:filling]
        for i in range(rest):
            expected += [forwards[filling + i], backwards[i]]
        expected += backwards[rest:]
        assert pass_order(rank, pipeline, virtual, microbatches) == expected
        assert pass_order(rank, pipeline, virtual, microbatches, forward_only=True) == forwards


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), [grid for grid in GRIDS if grid[2] >= grid[0]])
def test_equal_costs_give_the_closed_form(pipeline: int, virtual: int, microbatches: int) -> None:
    """Narayanan et al. 2021, section 2.2: filling and draining take (p - 1)(f + b) / v beside the ideal m (f + b)."""
    depths = pipeline * virtual
    timeline = simulate([[1.0 / virtual] * microbatches] * depths, [[2.0 / virtual] * microbatches] * depths, pipeline=pipeline)
    assert timeline.step_time == pytest.approx(3.0 * (microbatches + (pipeline - 1) / virtual))
    assert timeline.bubble_share == pytest.approx(even_bubble_share(pipeline, virtual, microbatches))
    assert timeline.busy == pytest.approx([3.0 * microbatches] * pipeline)


@pytest.mark.parametrize("costs", [(1.0, 3.0, 2.0), (3.0, 1.0, 1.0), (1.0, 1.0, 3.0), (2.0, 2.0, 2.0)])
def test_the_slowest_stage_sets_the_pace(costs: tuple[float, ...]) -> None:
    """Two microbatches more take the slowest stage twice more; the step is at most m - 1 of it and one microbatch's way."""
    times = [simulate([[c] * m for c in costs], [[2 * c] * m for c in costs], pipeline=3).step_time for m in (6, 8)]
    assert times[1] - times[0] == pytest.approx(2 * 3 * max(costs))
    assert 6 * 3 * max(costs) <= times[0] <= 5 * 3 * max(costs) + 3 * sum(costs)


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), GRIDS)
@pytest.mark.parametrize("message", [0.0, 0.25])
def test_unequal_costs_against_a_longest_path(pipeline: int, virtual: int, microbatches: int, message: float) -> None:
    """Relaxation over all constraints until nothing moves, with no notion of who is ready."""
    rng = random.Random(f"{pipeline}{virtual}{microbatches}")
    depths = pipeline * virtual

    def drawn() -> list[list[float]]:
        return [[rng.choice([0.0, rng.random(), 3 * rng.random()]) for _ in range(microbatches)] for _ in range(depths)]

    costs = {True: drawn(), False: drawn()}
    timeline = simulate(costs[True], costs[False], pipeline=pipeline, message=message)
    after: list[tuple[tuple[bool, int, int], tuple[bool, int, int], float]] = []
    for d, m in product(range(depths), range(microbatches)):
        if d:
            travel = message if pipeline > 1 else 0.0
            after += [((True, d - 1, m), (True, d, m), travel), ((False, d, m), (False, d - 1, m), travel)]
        else:
            after += [((True, depths - 1, m), (False, depths - 1, m), 0.0)]
    for rank in range(pipeline):
        keys = [(w.forward, w.chunk * pipeline + rank, w.microbatch) for w in pass_order(rank, pipeline, virtual, microbatches)]
        after += [(a, b, 0.0) for a, b in pairwise(keys)]
    start = {(f, d, m): 0.0 for f in (True, False) for d in range(depths) for m in range(microbatches)}
    moved = True
    while moved:
        moved = False
        for a, b, travel in after:
            earliest = start[a] + costs[a[0]][a[1]][a[2]] + travel
            if earliest > start[b]:
                start[b], moved = earliest, True
    for rank, work, begins, ends in timeline.intervals:
        key = (work.forward, work.chunk * pipeline + rank, work.microbatch)
        assert begins == pytest.approx(start[key])
        assert ends - begins == pytest.approx(costs[key[0]][key[1]][key[2]])
    assert len(timeline.intervals) == 2 * depths * microbatches
    busy = sum(map(sum, costs[True])) + sum(map(sum, costs[False]))
    assert timeline.bubble_share == pytest.approx(1 - busy / (pipeline * timeline.step_time))


def test_forward_only_has_no_backward_and_a_shorter_bubble() -> None:
    timeline = simulate([[1.0] * 4] * 3, None, pipeline=3)
    assert timeline.step_time == pytest.approx(6) and all(interval.work.forward for interval in timeline.intervals)
    assert timeline.bubble_share == pytest.approx(2 / 6)


@pytest.mark.parametrize(("pipeline", "virtual", "microbatches"), GRIDS)
def test_passes_in_flight(pipeline: int, virtual: int, microbatches: int) -> None:
    for rank in range(pipeline):
        order = pass_order(rank, pipeline, virtual, microbatches)
        filling = next(i for i, work in enumerate(order) if not work.forward)
        assert most_in_flight(order, [1.0] * virtual) == filling
        expected = pipeline - rank if virtual == 1 else 2 * (pipeline - rank - 1) + (virtual - 1) * pipeline + 1
        assert filling == min(expected, virtual * microbatches)


def test_unequal_chunks_in_flight_count_for_what_they_hold() -> None:
    order = pass_order(0, 2, 2, 4)
    assert most_in_flight(order, [1.0, 0.0]) == 4, "chunk 0: two microbatches, and two more before the first comes back"
    assert most_in_flight(order, [0.0, 1.0]) < most_in_flight(order, [1.0, 1.0])


@pytest.mark.parametrize(
    ("forward", "backward", "pipeline", "words"),
    [
        ([[1.0]] * 3, [[1.0]] * 3, 2, "3.*pipeline of 2"),
        ([[1.0]] * 2, [[1.0]] * 3, 1, r"\[2, 3\]"),
        ([[1.0], [1.0, 2.0]], None, 2, "every microbatch"),
        ([[1.0] * 3] * 4, [[1.0] * 3] * 4, 2, "3 microbatches"),
    ],
)
def test_impossible_schedules_are_refused(
    forward: list[list[float]], backward: list[list[float]] | None, pipeline: int, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        simulate(forward, backward, pipeline=pipeline)


def test_ranks_outside_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 is outside"):
        pass_order(2, 2, 1, 4)


def test_picture_shows_every_pass(tmp_path: Path) -> None:
    even, unequal = simulate([[1.0] * 4] * 4, [[2.0] * 4] * 4, pipeline=2), simulate([[1.0, 3.0]] * 2, [[0.0, 6.0]] * 2, pipeline=2)
    seen: list[tuple[float, float, float]] = []
    drawn = Axes.barh

    def barh(axis: Any, y: float, width: float, left: float, **kwargs: Any) -> Any:
        seen.append((y, left, width))
        return drawn(axis, y, width, left=left, **kwargs)

    with patch.object(Axes, "barh", barh):
        path = draw_schedules({"interleaved": even, "unequal": unequal}, tmp_path / "schedules.png", unit="s")
    assert path.stat().st_size > 10_000
    expected = [(i.rank, i.start, i.stop - i.start) for timeline in (even, unequal) for i in timeline.intervals if i.stop > i.start]
    assert seen == expected and len(seen) == 32 + 6
    with pytest.raises(ValueError, match="no timeline"):
        draw_schedules({}, tmp_path / "none.png")
