"""A picture and a page of where some steps' time goes on every rank: a lane a rank, coloured by part, microbatches numbered."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megavlm.tracking.timers import PARTS, Segment, seconds_of

COLOURS = {
    "data": "#8c6d31",
    "copy": "#c7b98a",
    "encoder": "#1b7837",
    "projector": "#7fbf7b",
    "language": "#2166ac",
    "head": "#053061",
    "language_backward": "#74add1",
    "encoder_backward": "#a6dba0",
    "communication": "#d73027",
    "pipeline": "#fddbc7",
    "optimizer": "#762a83",
    "other": "#bdbdbd",
}
"""Forward passes are dark, backward passes of the same module light; waiting is red."""
DARK = {"encoder", "language", "head", "communication", "optimizer", "data"}
MOST_SEGMENTS = 20_000
"""Of a lane on the page; the shortest are left out, and the page says so."""


class StepSpan(NamedTuple):
    """When a step ran on a rank, in seconds from the profile's beginning."""

    step: int
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class RankTimeline:
    """One rank's lane."""

    label: str
    segments: Sequence[Segment]
    steps: Sequence[StepSpan]


def write_timeline(folder: Path, ranks: Sequence[RankTimeline]) -> Path:
    """Write timeline.png and timeline.html to `folder`; returns the picture's path. Needs matplotlib, no display."""
    (folder / "timeline.html").write_text(page_of(ranks), encoding="utf-8")
    return _draw(folder / "timeline.png", ranks)


def _draw(path: Path, ranks: Sequence[RankTimeline]) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(16.0, 1.6 + 0.62 * len(ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    first, last = _bounds(ranks)
    scale, unit = (1e3, "ms") if last - first < 2.0 else (1.0, "s")
    for row, rank in enumerate(ranks):
        for name, colour in COLOURS.items():
            bars = [((s.begin_s - first) * scale, (s.end_s - s.begin_s) * scale) for s in rank.segments if s.part == name]
            axis.broken_barh(bars, (row - 0.4, 0.8), facecolors=colour, linewidth=0)
        _number_microbatches(axis, rank, row, first, last, scale)
        for step in rank.steps:
            axis.plot([(step.end_s - first) * scale] * 2, [row - 0.46, row + 0.46], color="black", linewidth=1.2)
    axis.set_yticks(range(len(ranks)), [rank.label for rank in ranks], fontsize=8)
    axis.set_ylim(len(ranks) - 0.45, -0.55)
    axis.set_xlim(0, (last - first) * scale)
    axis.set_xlabel(f"{unit}; a black line ends a step; numbers are microbatches")
    axis.spines[["top", "right"]].set_visible(False)
    steps = [step.step for step in ranks[0].steps]
    axis.set_title(f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}", loc="left", fontsize=10)
    occurring = {s.part for rank in ranks for s in rank.segments}
    patches = [Patch(color=colour, label=name.replace("_", " ")) for name, colour in COLOURS.items() if name in occurring]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)
    return path


def _number_microbatches(axis: Any, rank: RankTimeline, row: int, first: float, last: float, scale: float) -> None:
    """A number in the longest stretch of each microbatch's forward and backward pass, where it fits."""
    longest: dict[tuple[int, str, int], Segment] = {}
    for segment in rank.segments:
        if segment.microbatch is None or segment.part in ("communication", "pipeline"):
            continue
        step = sum(segment.begin_s >= s.end_s for s in rank.steps)
        key = (step, "b" if segment.part.endswith("backward") else "f", segment.microbatch)
        if key not in longest or _length(segment) > _length(longest[key]):
            longest[key] = segment
    for (_, _, number), segment in longest.items():
        if _length(segment) > 0.006 * (last - first) * len(str(number)):
            middle = ((segment.begin_s + segment.end_s) / 2 - first) * scale
            colour = "white" if segment.part in DARK else "black"
            axis.text(middle, row, str(number), ha="center", va="center", fontsize=7, color=colour)


def _length(segment: Segment) -> float:
    return segment.end_s - segment.begin_s


def _bounds(ranks: Sequence[RankTimeline]) -> tuple[float, float]:
    return min(s.begin_s for r in ranks for s in r.steps), max(s.end_s for r in ranks for s in r.steps)


def page_of(ranks: Sequence[RankTimeline]) -> str:
    """A page that needs no other file and no network: the lanes to zoom into with the wheel, and a table of seconds."""
    first, last = _bounds(ranks)
    total_us = (last - first) * 1e6
    lanes, left_out = [], 0
    for row, rank in enumerate(ranks):
        shown = sorted(rank.segments, key=_length, reverse=True)[:MOST_SEGMENTS]
        left_out += len(rank.segments) - len(shown)
        lanes += [_rectangle(s, row, first) for s in sorted(shown, key=lambda s: s.begin_s)]
        lanes += [
            f'<line x1="{(s.end_s - first) * 1e6:.1f}" x2="{(s.end_s - first) * 1e6:.1f}" y1="{row}" y2="{row + 1}"/>' for s in rank.steps
        ]
    names = "".join(f'<div class="name">{html.escape(rank.label)}</div>' for rank in ranks)
    note = f"<p>The {left_out} shortest stretches are not drawn.</p>" if left_out else ""
    steps = ", ".join(str(step.step) for step in ranks[0].steps)
    return _PAGE.format(
        title=f"Steps {steps}",
        lanes="\n".join(lanes),
        names=names,
        width=f"{total_us:.1f}",
        rows=len(ranks),
        height=28 * len(ranks),
        note=note,
        table=_table(ranks),
    )


def _rectangle(segment: Segment, row: int, first: float) -> str:
    microbatch = "" if segment.microbatch is None else f", microbatch {segment.microbatch}"
    return (
        f'<rect x="{(segment.begin_s - first) * 1e6:.1f}" y="{row + 0.05}" width="{_length(segment) * 1e6:.1f}" height="0.9" '
        f'fill="{COLOURS[segment.part]}"><title>{segment.part}{microbatch}: {_length(segment) * 1e3:.3f} ms from '
        f"{(segment.begin_s - first) * 1e3:.3f} ms</title></rect>"
    )


def _table(ranks: Sequence[RankTimeline]) -> str:
    """Milliseconds of a step of each part on each rank."""
    columns = [seconds_of(rank.segments) for rank in ranks]
    rows = []
    for name, meaning in PARTS.items():
        if any(column[name] for column in columns):
            cells = "".join(f"<td>{1e3 * column[name] / len(r.steps):.2f}</td>" for column, r in zip(columns, ranks, strict=True))
            rows.append(f'<tr><th><i style="background:{COLOURS[name]}"></i>{name}</th>{cells}<td class="what">{meaning}</td></tr>')
    sums = "".join(f"<td>{1e3 * sum(column.values()) / len(r.steps):.2f}</td>" for column, r in zip(columns, ranks, strict=True))
    head = "".join(f"<th>{html.escape(rank.label.split(':')[0])}</th>" for rank in ranks)
    return f"<table><tr><th>ms a step</th>{head}<th></th></tr>{''.join(rows)}<tr><th>step</th>{sums}<td></td></tr></table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px system-ui, sans-serif; margin: 24px; color: #222; }}
.lanes {{ display: flex; }} .name {{ height: 28px; line-height: 28px; padding-right: 12px; white-space: nowrap; font-size: 12px; }}
svg {{ flex: 1; background: #fafafa; cursor: grab; }} line {{ stroke: #000; stroke-width: 1.5; vector-effect: non-scaling-stroke; }}
table {{ border-collapse: collapse; margin-top: 24px; }} td, th {{ padding: 3px 12px; text-align: right; font-weight: normal; }}
tr {{ border-bottom: 1px solid #eee; }} th:first-child, td.what {{ text-align: left; }} td.what {{ color: #777; }}
i {{ display: inline-block; width: 12px; height: 12px; margin-right: 8px; vertical-align: -1px; }}
</style></head><body><h1>{title}</h1>
<p>The wheel zooms, dragging moves, a double click shows everything; rest on a bar to read it.</p>{note}
<div class="lanes"><div>{names}</div><svg viewBox="0 0 {width} {rows}" height="{height}" preserveAspectRatio="none">
{lanes}
</svg></div>
{table}
<script>
const svg = document.querySelector("svg"), full = [0, {width}];
let [left, width] = full, from = null;
const show = () => svg.setAttribute("viewBox", `${{left}} 0 ${{width}} {rows}`);
const clamp = () => {{ width = Math.min(width, full[1]); left = Math.max(0, Math.min(left, full[1] - width)); show(); }};
svg.addEventListener("wheel", e => {{
  e.preventDefault();
  const box = svg.getBoundingClientRect(), at = (e.clientX - box.left) / box.width, factor = Math.exp(e.deltaY / 400);
  left += at * width * (1 - factor); width *= factor; clamp();
}}, {{ passive: false }});
svg.addEventListener("mousedown", e => {{ from = [e.clientX, left]; }});
window.addEventListener("mouseup", () => {{ from = null; }});
window.addEventListener("mousemove", e => {{
  if (from) {{ left = from[1] - (e.clientX - from[0]) / svg.getBoundingClientRect().width * width; clamp(); }}
}});
svg.addEventListener("dblclick", () => {{ [left, width] = full; show(); }});
</script></body></html>
"""
