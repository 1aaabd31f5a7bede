"""The run in one picture: loss by stage, loss by task, learning rates, where time went, memory; drawn from metrics.jsonl alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megavlm.tracking.curves_of_ranks import draw_memory, draw_times, read_of_ranks
from megavlm.tracking.metrics import EVALUATION_FILE, METRICS_FILE, MetricsError, count_lines, flatten, read_metrics

MAX_POINTS = 5000
"""More than the picture has columns; a longer run is drawn from every k-th step."""
SMOOTHING_STEPS = 50
"""Horizon of the running mean, in drawn points; short stages take a twentieth of their length."""

Series = dict[str, tuple[list[int], list[float]]]


def plot_curves(run_dir: str | Path, name: str = "curves.png") -> Path:
    """Draw the curves of the run in `run_dir` into `<run_dir>/<name>`; returns its path. Needs matplotlib, no display.

    Raises MetricsError when the run has no step yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    path = run_dir / METRICS_FILE
    every = max(1, count_lines(path) // MAX_POINTS) if path.exists() else 1
    records = read_metrics(run_dir, every=every)
    if not records:
        raise MetricsError(f"{path} holds no step: there is nothing to draw")
    stages = _stages(records)
    tasks, rates = _series(records, "task_loss/"), _series(records, "lr/")
    rows = [_draw_loss] + ([_draw_tasks] if tasks else []) + ([_draw_rates] if rates else [])
    of_ranks = read_of_ranks(path, MAX_POINTS)
    below = [draw for key, draw in (("all_ranks_time_s", draw_times), ("memory", draw_memory)) if any(key in r for r in of_ranks)]
    # Figure without pyplot: no global state, no window, safe beside a user's own plots.
    number = len(rows) + len(below)
    figure = Figure(figsize=(9.0, 1.0 + 2.6 * number), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(number, 1, sharex=True, squeeze=False)[:, 0]
    for axis, draw in zip(axes, rows, strict=False):
        draw(axis, records, _evaluation(run_dir), tasks if draw is _draw_tasks else rates, stages)
    for axis, draw_ranks in zip(axes[len(rows) :], below, strict=True):
        draw_ranks(axis, of_ranks, dict(stages))
        _legend(axis)
    for axis in axes:
        for _, first in stages[1:]:
            axis.axvline(first - 0.5, color="0.8", linewidth=0.8, zorder=0)
        axis.grid(axis="y", color="0.92", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("optimizer step" + (f" (every {every}th drawn)" if every > 1 else ""))
    figure.savefig(run_dir / name, dpi=110)
    return run_dir / name


def _draw_loss(axis: Any, records: Sequence[dict[str, Any]], evaluation: Series, _: Series, stages: list[tuple[str, int]]) -> None:
    values: list[float] = []
    for i, (stage, _first) in enumerate(stages):
        found = [(r["step"], float(r["loss"])) for r in records if r.get("stage", "") == stage and r.get("loss") is not None]
        if not found:
            continue
        steps, losses = [s for s, _ in found], [v for _, v in found]
        values += losses
        axis.plot(steps, losses, color=f"C{i % 10}", alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth(losses), color=f"C{i % 10}", linewidth=1.6, label=stage or "loss")
    for i, (label, (steps, losses)) in enumerate(evaluation.items()):
        axis.plot(
            steps,
            losses,
            linestyle="none",
            marker="osD^v"[i % 5],
            markersize=4,
            color="black",
            fillstyle="none",
            label=f"held out: {label}",
        )
    axis.set_ylabel("loss")
    _log_scale_if_wide(axis, values)
    _legend(axis)


def _draw_tasks(axis: Any, _: Sequence[dict[str, Any]], __: Series, tasks: Series, ___: list[tuple[str, int]]) -> None:
    for task, (steps, losses) in sorted(tasks.items()):
        axis.plot(steps, smooth(losses), linewidth=1.4, label=task)
    axis.set_ylabel("loss by task (smoothed)")
    _log_scale_if_wide(axis, [v for _, losses in tasks.values() for v in losses])
    _legend(axis)


def _draw_rates(axis: Any, _: Sequence[dict[str, Any]], __: Series, rates: Series, ___: list[tuple[str, int]]) -> None:
    for group, (steps, values) in sorted(rates.items()):
        # A group that is frozen in a stage has no line there: break it instead of drawing across.
        axis.plot(steps, values, linewidth=1.4, label=group)
    axis.set_ylabel("learning rate")
    axis.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _legend(axis)


def _legend(axis: Any) -> None:
    if axis.get_legend_handles_labels()[1]:
        # Beside the curves: any place inside hides some run's important part.
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _log_scale_if_wide(axis: Any, values: Sequence[float]) -> None:
    finite = [v for v in values if 0 < v < float("inf")]
    if len(finite) == len(values) and finite and max(finite) > 30 * min(finite):
        axis.set_yscale("log")


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean that starts unbiased (Adam's correction) and steps over NaN and infinity."""
    horizon = max(1.0, min(SMOOTHING_STEPS, len(values) / 20))
    keep, total, weight = 1.0 - 1.0 / horizon, 0.0, 0.0
    means: list[float] = []
    for value in values:
        if value == value and abs(value) != float("inf"):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight if weight else float("nan"))
    return means


def _stages(records: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    """(stage, its first step), in order."""
    first: dict[str, int] = {}
    for record in records:
        first.setdefault(record.get("stage", ""), record["step"])
    return list(first.items())


def _series(records: Sequence[dict[str, Any]], prefix: str) -> Series:
    """{name: (steps, values)} of the flat keys below `prefix`; NaN where a record after the first lacks the key."""
    flats = [(r["step"], flatten({k: v for k, v in r.items() if isinstance(v, dict)})) for r in records]
    names = {key for _, flat in flats for key in flat if key.startswith(prefix)}
    series: Series = {}
    for name in names:
        points = [(step, flat.get(name)) for step, flat in flats]
        if prefix == "task_loss/":  # a task absent from a step's samples is no gap in its curve
            points = [(s, v) for s, v in points if v is not None]
        series[name.removeprefix(prefix)] = ([s for s, _ in points], [float("nan") if v is None else float(v) for _, v in points])
    return series


def _evaluation(run_dir: Path) -> Series:
    """Every held-out loss: keys of evaluation.jsonl that are called loss, or lie below one that is."""
    if not (run_dir / EVALUATION_FILE).exists():
        return {}
    series: Series = {}
    for record in read_metrics(run_dir, EVALUATION_FILE):
        for key, value in flatten(record).items():
            if isinstance(value, (int, float)) and "loss" in key.split("/"):
                label = "/".join(part for part in key.split("/") if part != "loss") or str(record.get("source", "all"))
                steps, values = series.setdefault(label, ([], []))
                steps.append(record["step"])
                values.append(float(value))
    return series
