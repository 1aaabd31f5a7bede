"""Bubble of the pipeline schedules: as planned from FLOPs, as simulated from measured passes, and as measured on gloo ranks.

    python benchmarks/pipeline.py [--ranks 2] [--steps 8] [--out benchmarks/results/pipeline.json] [--picture pipeline.png]
    python benchmarks/pipeline.py --tiny        (seconds; to see that it runs)

One rank a core. Real packs of the demonstration data, so that microbatches differ and some have no picture; everything trains. Cases: the
1F1B schedule and the interleaved one (two chunks a rank), each with layers spread evenly and balanced by FLOPs. For each case:
    planned     idle share by the planner's FLOPs of the very microbatches that ran (what `megavlm train --dry-run` tells beforehand)
    simulated   idle share when the schedule is played with the measured time of every pass, and messages cost nothing
    measured    idle share of the ranks from the first pass's begin to the last one's end, by timers around every forward and backward
                pass on one clock; what simulated lacks of it are messages and Python between passes
    closed form idle share if all stages and microbatches cost the same
    step        seconds from the first pass's begin to the last one's end
    stages      seconds of forward and backward passes on each rank
Medians over steps, the first two left out. On other numbers of ranks than cores, ranks take turns on cores and the times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from megavlm.config.schema import Recipe
from megavlm.planner.flops import FlopsModel
from megavlm.planner.schedule import Interval, Timeline, even_bubble_share, pass_order, simulate
from megavlm.planner.schedule_picture import draw_schedules
from megavlm.planner.stages import microbatch_cost, play
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage
from megavlm.topology.pipeline import PipelineSplit
from megavlm.topology.table import text_table
from megavlm.tracking.environment import environment_report

WARM_UP_STEPS = 2
CASES: dict[str, dict[str, Any]] = {
    "1F1B, even": {},
    "1F1B, balanced": {"split": "balanced"},
    "interleaved, even": {"virtual_pipeline": 2},
    "interleaved, balanced": {"virtual_pipeline": 2, "split": "balanced"},
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": {"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 3},
        "language": {"num_layers": 8, "hidden_size": 48, "ffn_hidden_size": 96},
    },
    "small": {
        "vision": {"hidden_size": 256, "ffn_hidden_size": 1024, "num_layers": 9},
        "language": {"num_layers": 8, "hidden_size": 384, "ffn_hidden_size": 1024, "vocab_size": 8192},
    },
}


@dataclass(frozen=True)
class RankSteps:
    """What one rank measured."""

    counts: tuple[int, ...]
    """Layers of each chunk, from the bottom of the model to its top."""
    passes: list[list[tuple[float, float]]]
    """Begin and end of every pass of every step, in the schedule's order, on the clock of the machine."""
    planned: list[Timeline]
    """The planner's schedule of each step, in FLOPs."""


def train_timed(recipe: Recipe, steps: int) -> RankSteps:
    """Train on this rank, with a timer around every pass."""
    from megatron.core.pipeline_parallel import schedules

    from megavlm.parallel.context import choose_device, enter_grid, leave_grid
    from megavlm.training.checkpointing import prepare_model
    from megavlm.training.data import RunData
    from megavlm.training.layout import settled_layout, shape_of, stage_layout
    from megavlm.training.optimizer import set_learning_rate
    from megavlm.training.state import RunState
    from megavlm.training.step import train_step

    stage, data, state = recipe.stages[0], RunData(recipe), RunState()
    layout = settled_layout(recipe, 0, stage_layout(recipe.parallel, stage, recipe.model), dist.get_world_size(), data.indexes(stage))
    split = PipelineSplit.of(recipe.model.language.num_layers, layout)
    ctx = enter_grid(layout, choose_device(recipe.run), recipe.run.seed)
    model = prepare_model(recipe, stage, layout, state, ctx)
    stream = data.open_stage(stage, ctx, state)
    flops, passes, planned = FlopsModel(recipe.model, stage), [], []
    try:
        for _ in range(steps):
            batches = stream.next()
            set_learning_rate(model.optimizer, stage, state.stage_step)
            log: list[tuple[float, float]] = []
            dist.barrier()
            with (
                patch.object(schedules, "forward_step", timed(schedules.forward_step, log)),
                patch.object(schedules, "backward_step", timed(schedules.backward_step, log)),
            ):
                train_step(model, batches.microbatches, stream.tasks, ctx)
            passes.append(log)
            mine = batches.plan.assignment[ctx.data_rank]
            planned.append(play(split, [microbatch_cost(flops, map(shape_of, packs)) for packs in mine]))
    finally:
        stream.close()
        leave_grid()
    return RankSteps(split.counts, passes, planned)


def timed(function: Callable[..., Any], log: list[tuple[float, float]]) -> Callable[..., Any]:
    """`function`, its begin and end written down."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        result = function(*args, **kwargs)
        log.append((begin, time.perf_counter()))
        return result

    return wrapper


def measured(ranks: list[RankSteps], step: int, virtual: int, num_microbatches: int) -> Timeline:
    """What really happened in a step; time 0 is the first pass's begin."""
    first = min(rank.passes[step][0][0] for rank in ranks)
    intervals = []
    for number, rank in enumerate(ranks):
        order = pass_order(number, len(ranks), virtual, num_microbatches)
        for work, (begin, end) in zip(order, rank.passes[step], strict=True):
            intervals.append(Interval(number, work, begin - first, end - first))
    return Timeline(tuple(intervals), len(ranks))


def replayed(timeline: Timeline, virtual: int, num_microbatches: int) -> Timeline:
    """The schedule with every pass as long as it was, and nothing between passes."""
    pipeline = timeline.num_ranks
    costs = {way: [[0.0] * num_microbatches for _ in range(pipeline * virtual)] for way in (True, False)}
    for interval in timeline.intervals:
        work = interval.work
        costs[work.forward][work.chunk * pipeline + interval.rank][work.microbatch] = interval.stop - interval.start
    return simulate(costs[True], costs[False], pipeline=pipeline)


def summary(name: str, ranks: list[RankSteps], virtual: int, num_microbatches: int) -> tuple[dict[str, Any], dict[str, Timeline]]:
    """One case's row, and the timelines of the step of median length."""
    steps = range(WARM_UP_STEPS, len(ranks[0].passes))
    real = [measured(ranks, step, virtual, num_microbatches) for step in steps]
    again = [replayed(timeline, virtual, num_microbatches) for timeline in real]
    planned = [ranks[0].planned[step] for step in steps]

    def median(values: list[float]) -> float:
        return round(statistics.median(values), 4)

    row = {
        "case": name,
        "layers": "+".join(map(str, ranks[0].counts)),
        "closed_form_idle_percent": round(100 * even_bubble_share(len(ranks), virtual, num_microbatches), 2),
        "planned_idle_percent": median([100 * t.bubble_share for t in planned]),
        "simulated_idle_percent": median([100 * t.bubble_share for t in again]),
        "measured_idle_percent": median([100 * t.bubble_share for t in real]),
        "step_s": median([t.step_time for t in real]),
        "simulated_step_s": median([t.step_time for t in again]),
        "planned_step_gflops_of_a_rank": median([t.step_time / 1e9 for t in planned]),
        "stages_s": [median([t.busy[rank] for t in real]) for rank in range(len(ranks))],
    }
    usual = sorted(range(len(real)), key=lambda step: real[step].step_time)[len(real) // 2]
    return row, {f"{name}, simulated from measured passes": again[usual], f"{name}, measured": real[usual]}


def recipe_of(folder: Path, data: Path, size: str, parallel: dict[str, Any], microbatches: int, steps: int) -> Recipe:
    """One stage in which everything trains."""
    stage = tiny_stage(steps=steps, packs_per_step=microbatches) | {"mixture": {"pages": 0.4, "multi": 0.2, "text": 0.4}}
    seq_len = {"seq_len_tokens": 256 if size == "tiny" else 1024}
    return tiny_recipe(folder, data, [stage], model=SIZES[size], parallel=parallel, data=seq_len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="measured steps of each case")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    size = "tiny" if arguments.tiny else "small"
    rows: list[dict[str, Any]] = []
    timelines: dict[str, Timeline] = {}
    pool = RankPool(arguments.ranks)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = make_tiny_data(Path(folder) / "data")
            for name, options in CASES.items():
                steps = arguments.steps + WARM_UP_STEPS
                parallel = {"pipeline": arguments.ranks, **options}
                recipe = recipe_of(Path(folder) / name, data, size, parallel, arguments.microbatches, steps)
                ranks = pool.run(train_timed, recipe, steps, world_size=arguments.ranks)
                row, drawn = summary(name, ranks, options.get("virtual_pipeline", 1), arguments.microbatches)
                rows.append(row)
                timelines |= drawn
    finally:
        pool.close()
    title = f"{arguments.ranks} ranks, {arguments.microbatches} microbatches"
    print(text_table(tuple(rows[0]), [tuple(row.values()) for row in rows], title))
    if arguments.picture is not None:
        print(f"wrote {draw_schedules(timelines, arguments.picture, unit='s')}")
    if arguments.out is not None:
        chosen = f"--ranks {arguments.ranks} --microbatches {arguments.microbatches} --steps {arguments.steps}"
        command = f"python benchmarks/pipeline.py {chosen}" + (" --tiny" if arguments.tiny else "")
        report = {"command": command, "size": size, "model": SIZES[size], "cases": rows, "environment": environment_report()}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
