"""A schedule as a picture: a lane for each pipeline rank, its passes over time, what is left white is the bubble."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megavlm.planner.schedule import Interval, Timeline

FORWARD, BACKWARD = "#4477aa", "#e08a3c"
"""Of the lowest chunk; those above are paler."""
_NARROWEST = 0.009
"""Share of the picture's width that a pass needs for its microbatch's number."""


def draw_schedules(timelines: Mapping[str, Timeline], path: str | Path, *, unit: str = "") -> Path:
    """Draw timelines below each other on one axis of time (in `unit`) and write them to `path`; returns it. Needs matplotlib, no display.

    Raises ValueError when there is nothing to draw.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    if not timelines:
        raise ValueError("there is no timeline to draw")
    longest = max(timeline.step_time for timeline in timelines.values())
    ranks = [timeline.num_ranks for timeline in timelines.values()]
    figure = Figure(figsize=(13.0, 0.9 + sum(0.75 + 0.42 * number for number in ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, height_ratios=[1 + number for number in ranks])[:, 0]
    for axis, (title, timeline) in zip(axes, timelines.items(), strict=True):
        _draw(axis, timeline, longest)
        axis.set_title(f"{title}: step {timeline.step_time:.3g}{unit and ' ' + unit}, idle {100 * timeline.bubble_share:.1f} %", loc="left")
    axes[-1].set_xlabel(f"time{unit and ' (' + unit + ')'}")
    chunks = 1 + max(interval.work.chunk for timeline in timelines.values() for interval in timeline.intervals)
    looks = [(way, chunk) for way in (True, False) for chunk in range(chunks)]
    patches = [Patch(color=_colour(*look), label=_name(*look, chunks)) for look in looks]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    return Path(path)


def _draw(axis: Any, timeline: Timeline, longest: float) -> None:
    begin = min(interval.start for interval in timeline.intervals)
    for interval in timeline.intervals:
        start, width = interval.start - begin, interval.stop - interval.start
        if not width:
            continue
        colour = _colour(interval.work.forward, interval.work.chunk)
        axis.barh(interval.rank, width, left=start, height=0.82, color=colour, edgecolor="white")
        if width > _NARROWEST * longest:
            _number(axis, interval, start + width / 2)
    axis.set_yticks(range(timeline.num_ranks), [f"rank {rank}" for rank in range(timeline.num_ranks)])
    axis.invert_yaxis()
    axis.set_xlim(0, longest * 1.005)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _number(axis: Any, interval: Interval, middle: float) -> None:
    dark = interval.work.chunk > 0
    colour = "#1f2933" if dark else "white"
    axis.text(middle, interval.rank, str(interval.work.microbatch), ha="center", va="center", fontsize=7, color=colour)


def _name(forward: bool, chunk: int, chunks: int) -> str:
    return ("forward" if forward else "backward") + (f", chunk {chunk}" if chunks > 1 else "")


def _colour(forward: bool, chunk: int) -> tuple[float, float, float]:
    """The way's colour, halfway to white with each chunk, down to a fifth of it."""
    from matplotlib.colors import to_rgb

    share = max(0.55**chunk, 0.2)
    red, green, blue = (1 - share * (1 - value) for value in to_rgb(FORWARD if forward else BACKWARD))
    return red, green, blue
