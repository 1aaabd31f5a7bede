"""Draws plan.png: a curriculum as it is planned, and what balance does to the microbatches of a step.

    python docs/pictures/plan.py

Both panels run the planner, on the made-up mixes of benchmarks/packing.py.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from balance import SEQ_LEN, deal, in_turn, pack_costs  # noqa: E402
from packing import OURS, PACKERS, make_mix  # noqa: E402
from plan_state import make_index, planner  # noqa: E402

from megavlm.data.packing import Budget  # noqa: E402

COLOURS = {"llava": "#4477aa", "tiles": "#228833", "text": "#aa7711"}
STEPS = 120


def draw_curriculum(axes: Axes) -> None:
    """Shares of each step: dots as planned, lines as the recipe says."""
    rows = {"llava": 6000, "tiles": 900, "text": 6000}
    mixture: dict[str, object] = {
        "llava": {"weight": {0: 6, 80: 2}},
        "tiles": {"weight": {0: 2}, "max_epochs": 2},
        "text": {"weight": {0: 1, 40: 4}, "change": "steps"},
    }
    steps = planner({name: make_index(name, count) for name, count in rows.items()}, mixture, packs=16)
    shares: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(STEPS):
        plan = steps.next()
        counts = Counter(s.source for rank in plan.assignment for group in rank for pack in group for s in pack.samples)
        for name, share in shares.items():
            share.append(100 * counts[name] / counts.total())
    capped = next(step for step, share in enumerate(shares["tiles"]) if not share)
    for name, share in shares.items():
        axes.plot(range(STEPS), share, ".", color=COLOURS[name], markersize=3)
        asked = []
        for step in range(STEPS):
            weights = {"llava": 6 - 4 * min(step, 80) / 80, "tiles": 2.0 if step < capped else 0.0, "text": 1.0 if step < 40 else 4.0}
            asked.append(100 * weights[name] / sum(weights.values()))
        axes.plot(range(STEPS), asked, color=COLOURS[name], linewidth=1.2, label=name)
    axes.axvline(capped, color="#888888", linewidth=0.8, linestyle=":")
    axes.annotate("tiles reaches\nmax_epochs: 2", (capped + 1.5, 55), fontsize=8, color="#52606d")
    axes.set(xlabel="step", ylabel="share of samples, %", ylim=(0, 90), title="A curriculum: lines asked for, dots planned")
    axes.legend(frameon=False, fontsize=8, loc="upper right")


def draw_balance(axes: Axes, way: str) -> None:
    """Cost of each microbatch on 64 ranks."""
    samples = make_mix("tiles", 4000, SEQ_LEN)
    costs = pack_costs(PACKERS[OURS](samples, Budget(SEQ_LEN))[:512], "tiles")
    dealt = (in_turn if way == "in turn" else deal)(costs, 64, 8)
    work = np.array([[costs[items, 0].sum() for items in rank] for rank in dealt]) / costs[:, 0].mean()
    image = axes.imshow(work.T, aspect="auto", cmap="RdBu_r", vmin=0.95, vmax=1.05, interpolation="nearest")
    waits = 100 * (1 - work.sum(axis=1).mean() / work.sum(axis=1).max())
    each = 100 * (1 - work.sum(axis=1).mean() / work.max(axis=0).sum())
    axes.set_title(f"{way}: idle {waits:.2f} % a step, {each:.2f} % a microbatch", fontsize=9)
    axes.set(xlabel="data-parallel rank" if way != "in turn" else "", ylabel="microbatch")
    axes.figure.colorbar(image, ax=axes, label="cost / mean", ticks=[0.95, 1, 1.05])


def main() -> None:
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subfigures(1, 2)
    draw_curriculum(left.subplots())
    for axes, way in zip(right.subplots(2, 1), ("in turn", "megavlm"), strict=True):
        draw_balance(axes, way)
    figure.savefig(HERE / "plan.png", dpi=110)


if __name__ == "__main__":
    main()
