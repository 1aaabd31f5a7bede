"""The figure of a stage's statistics."""

from __future__ import annotations

import colorsys
from pathlib import Path
from typing import Any

from megavlm.data.inspect.pictures import hue

_VISION, _LANGUAGE, _INK = "#e08a1e", "#4a63d8", "#1d2126"


def draw(statistics: dict[str, Any], path: Path) -> None:
    """One PNG with a panel each: lengths, patches, tasks, mixture, fill, share of vision in the FLOPs. Needs no display."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left"}
    with rc_context(style):
        figure = Figure(figsize=(12, 6.4), layout="constrained", dpi=110)
        FigureCanvasAgg(figure)
        (lengths, patches, tasks), (mixture, fill, cost) = figure.subplots(2, 3)
        is_tokens = statistics["objective"] != "vision_classification"
        _spread(lengths, statistics, "length", "tokens of a sample" if is_tokens else "pictures of a sample")
        _spread(patches, statistics, "patches", "patches of a sample")
        _tasks(tasks, statistics)
        _mixture(mixture, statistics)
        _fill(fill, statistics)
        _cost(cost, statistics)
        steps = statistics["num_planned_steps"]
        figure.suptitle(f"stage {statistics['stage']}: {statistics['objective']}, {steps} steps planned", x=0.01, ha="left", fontsize=12)
        figure.savefig(path)


def _colour(number: int) -> tuple[float, float, float]:
    return colorsys.hls_to_rgb(hue(number) / 360, 0.55, 0.6)


def _spread(axes: Any, statistics: dict[str, Any], column: str, title: str) -> None:
    for number, (name, source) in enumerate(statistics["sources"].items()):
        spread = source[column]
        if spread["max"] == 0:
            continue
        shares = [count / source["samples"] for count in spread["counts"]]
        axes.stairs(shares, spread["edges"], color=_colour(number), fill=True, alpha=0.25)
        axes.stairs(shares, spread["edges"], color=_colour(number), linewidth=1.4, label=f"{name}: mean {spread['mean']:.4g}")
    axes.set_title(title)
    axes.set_ylabel("share of the source")
    if axes.has_data():
        axes.legend(frameon=False, fontsize=8)
    else:
        axes.text(0.5, 0.5, "no pictures", ha="center", transform=axes.transAxes)


def _tasks(axes: Any, statistics: dict[str, Any]) -> None:
    bars = [
        (f"{name} / {task}", count, i) for i, (name, s) in enumerate(statistics["sources"].items()) for task, count in s["tasks"].items()
    ]
    shown = sorted(bars, key=lambda bar: -bar[1])[:14][::-1]
    axes.barh([name for name, _, _ in shown], [count for _, count, _ in shown], color=[_colour(i) for _, _, i in shown])
    axes.set_title("samples of each task" + (f" (the largest 14 of {len(bars)})" if len(bars) > len(shown) else ""))


def _mixture(axes: Any, statistics: dict[str, Any]) -> None:
    sources = statistics["sources"]
    names, places = list(sources), range(len(sources))
    axes.barh(places, [s["realised_share"] for s in sources.values()], color=[_colour(i) for i in places], height=0.6)
    for place, source in zip(places, sources.values(), strict=True):
        axes.plot([source["target_share"]] * 2, [place - 0.42, place + 0.42], color=_INK, linewidth=2)
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    axes.set_title("share of samples; line: target")


def _fill(axes: Any, statistics: dict[str, Any]) -> None:
    fills = [100 * step["pack_fill"] for step in statistics["steps"]]
    axes.plot(range(len(fills)), fills, color=_LANGUAGE, linewidth=1.4, marker="." if len(fills) < 60 else "")
    axes.set_title(f"fill in %: mean {100 * statistics['mean_fill']:.2f}, lowest {100 * statistics['lowest_fill']:.2f}")
    axes.set_xlabel("step")
    axes.set_ylim(min(*fills, 99.0) - 0.5, 100.2)
    axes.ticklabel_format(axis="y", useOffset=False)


def _cost(axes: Any, statistics: dict[str, Any]) -> None:
    shares = [100 * step["vision_share"] for step in statistics["steps"]]
    places = range(len(shares))
    axes.stackplot(places, shares, [100 - s for s in shares], colors=[_VISION, _LANGUAGE], labels=["vision", "language model"], step="mid")
    axes.set_ylim(0, 100)
    axes.set_title(f"FLOPs in %: vision {100 * statistics['vision_share_of_flops']:.1f}")
    axes.set_xlabel("step")
    axes.legend(loc="lower right", framealpha=0.9, fontsize=8)
