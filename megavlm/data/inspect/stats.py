"""A stage's data in numbers: its sources from their indexes, its packs from planned steps. No sample is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from megavlm.data.index import SampleIndex
from megavlm.data.inspect.opened import OpenStage
from megavlm.data.inspect.step import cost_of, target_shares
from megavlm.data.inspect.views import Cost
from megavlm.data.plan import EndOfData
from megavlm.planner.flops import FlopsModel

NUM_BINS = 40


def stage_statistics(opened: OpenStage, num_steps: int, dp_size: int, at_step: Callable[[int], object] | None = None) -> dict[str, Any]:
    """Everything that `megavlm data stats` tells of a stage, as JSON values.

    Args:
        num_steps: steps to plan, from the stage's first; at most as many as it has, or as its data fill.
        at_step: called with the number of each step when it is planned.
    """
    planner, flops = opened.planner(dp_size), FlopsModel(opened.recipe.model, opened.stage)
    rows = {name: len(index) for name, index in opened.indexes.items()}
    steps: list[dict[str, float]] = []
    samples: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    targets = dict.fromkeys(opened.indexes, 0.0)
    cost = Cost(0.0, 0.0)
    for _ in range(min(num_steps, opened.stage.steps)):
        try:
            plan = planner.next()
        except EndOfData:
            break
        packs = [pack for rank in plan.assignment for group in rank for pack in group]
        for ref, length in ((r, n) for pack in packs for r, n in zip(pack.samples, pack.lengths_tokens, strict=True)):
            samples[ref.source] += 1
            tokens[ref.source] += length
        step_cost = sum((cost_of(flops, pack) for pack in packs), Cost(0.0, 0.0))
        cost += step_cost
        shares = target_shares(opened.stage, rows, plan.step)
        count = sum(len(pack.samples) for pack in packs)
        targets = {name: targets[name] + shares[name] * count for name in targets}
        steps.append({**plan.statistics, "vision_share": step_cost.vision_share})
        if at_step is not None:
            at_step(plan.step)
    whole = sum(samples.values())
    return {
        "stage": opened.stage.name,
        "objective": opened.stage.objective,
        "num_planned_steps": len(steps),
        "dp_size": dp_size,
        "pack_capacity": opened.capacity,
        "mean_fill": float(np.mean([step["pack_fill"] for step in steps])),
        "lowest_fill": min(step["pack_fill"] for step in steps),
        "mean_idle": float(np.mean([1 - 1 / step["flops_imbalance"] for step in steps])),
        "longest_wait_samples": max(step["oldest_wait_samples"] for step in steps),
        "vision_share_of_flops": cost.vision_share,
        "flops_per_step": cost.total / len(steps),
        "steps": steps,
        "sources": {
            name: {
                **_source(index),
                "target_share": targets[name] / whole,
                "realised_share": samples[name] / whole,
                "samples_per_step": samples[name] / len(steps),
                "tokens_per_step": tokens[name] / len(steps),
                "steps_per_epoch": rows[name] * len(steps) / samples[name] if samples[name] else None,
            }
            for name, index in opened.indexes.items()
        },
    }


def _source(index: SampleIndex) -> dict[str, Any]:
    """One source from its index. Lengths are in tokens; with vision_classification a sample counts 1."""
    return {
        "samples": len(index),
        "tokens_per_epoch": int(index.length_tokens.sum()),
        "targets_per_epoch": int(index.num_targets.sum()),
        "length": _spread(index.length_tokens),
        "tiles": _spread(index.num_tiles),
        "patches": _spread(index.num_patches),
        "tasks": {task: int((index.task_ids == number).sum()) for number, task in enumerate(index.task_names)},
        "over_long": {kind: int(count) for kind, count in index.notes.items()},
    }


def _spread(values: np.ndarray) -> dict[str, Any]:
    """Mean, quantiles and a histogram of `NUM_BINS` bins (one a value where there are fewer)."""
    low, high = int(values.min()), int(values.max())
    bins = min(NUM_BINS, high - low + 1)
    counts, edges = np.histogram(values, bins=bins, range=(low, high + 1))
    quantiles = {f"p{q}": float(np.percentile(values, q)) for q in (5, 50, 95)}
    return {"mean": float(values.mean()), "min": low, "max": high, **quantiles, "counts": counts.tolist(), "edges": edges.tolist()}
