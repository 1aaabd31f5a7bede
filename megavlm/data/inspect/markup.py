"""Small pieces of HTML. Every text goes through `text`: what a data set says is shown, never run."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from megavlm.data.inspect.pictures import hue
from megavlm.data.inspect.views import Cost, PackView, PictureView, SampleView, TokenRun
from megavlm.topology.table import human_count

_SHOWN_PX = 200
_MAX_LABELLED_PATCHES = 1600


def text(value: object) -> str:
    """Escaped for element content and for attributes in double quotes."""
    return escape(str(value), quote=True)


def percent(share: float, digits: int = 1) -> str:
    """0.9987 -> 99.9 %."""
    return f"{100 * share:.{digits}f} %"


def tip(lines: Iterable[str]) -> str:
    """Attribute of what is told when the pointer is over an element."""
    return f'data-tip="{text(chr(10).join(lines))}"'


def sample_id(pack: PackView, number: int) -> str:
    """Anchor of a sample shown in detail."""
    return f"s{pack.rank}-{pack.microbatch}-{pack.place}-{number}"


def sample_facts(sample: SampleView, classifies: bool) -> list[str]:
    """A sample in short lines."""
    facts = [f"{sample.source} / {sample.task}"]
    if not classifies:
        facts.append(f"{sample.length:,} tokens, {sample.targets:,} of them targets")
    else:
        facts.append(f"{sample.targets:,} labelled patches")
    if sample.tiles:
        facts.append(f"{plural(sample.tiles, 'tile')}, {sample.patches:,} patches")
    if sample.weight is not None:
        facts.append(f"weight {sample.weight:.4g}")
    return facts


def plural(count: int, noun: str) -> str:
    """1 tile, 2 tiles."""
    return f"{count:,} {noun}" + ("" if count == 1 else "es" if noun.endswith(("s", "ch")) else "s")


def pack_bar(pack: PackView, sources: list[str], tasks: list[str], classifies: bool) -> str:
    """A pack as a bar: a coloured part a sample, as long as the sample, and the padding."""
    parts = []
    for number, sample in enumerate(pack.samples):
        hues = f"--h:{hue(number)};--hs:{hue(sources.index(sample.source))};--ht:{hue(tasks.index(sample.task))}"
        name = "a" if pack.is_detailed else "span"
        link = f' href="#{sample_id(pack, number)}"' if pack.is_detailed else ""
        lost = " lost" if sample.problem is not None else ""
        problem = [f"could not be read: {sample.problem}"] if sample.problem is not None else []
        told = tip([sample.key, *sample_facts(sample, classifies), *problem])
        width = 100 * sample.length / pack.capacity
        parts.append(f'<{name} class="seg{lost}"{link} style="width:{width:.4f}%;{hues}" {told}></{name}>')
    if (rest := pack.capacity - pack.used) > 0:
        unit = "pictures fewer than it can hold" if classifies else "tokens of padding"
        parts.append(f'<span class="pad" style="width:{100 * rest / pack.capacity:.4f}%" {tip([f"{rest:,} {unit}"])}></span>')
    return f'<div class="bar">{"".join(parts)}</div>'


def work_bar(costs: list[Cost], busiest: float) -> str:
    """A rank's microbatches one after another, each split into vision and language, and the time it waits for the busiest rank."""
    parts = []
    for number, cost in enumerate(costs):
        shares = f"vision {percent(cost.vision_share)}, language {percent(1 - cost.vision_share)}"
        told = tip([f"microbatch {number}: {human_count(cost.total)} FLOPs", shares])
        inner = "".join(
            f'<i class="{kind}" style="width:{100 * flops / cost.total:.4f}%"></i>'
            for kind, flops in (("vision", cost.vision), ("language", cost.language))
            if flops
        )
        # 2 px stand between microbatches: a little less than the exact width, the same for all.
        parts.append(f'<div style="width:{99.5 * cost.total / busiest if busiest else 0:.4f}%" {told}>{inner}</div>')
    total = sum(cost.total for cost in costs)
    wait = 1 - total / busiest if busiest else 0.0
    idle = f'<div class="idle" {tip([f"waits {percent(wait, 2)} of the step"])}></div>' if wait > 1e-12 else ""
    return f'<div class="work">{"".join(parts)}{idle}</div>'


def tokens(runs: Iterable[TokenRun]) -> str:
    """A sample's tokens, coloured by what the loss does with them."""
    parts, place = [], 0
    for run in runs:
        if run.kind == "visual":
            parts.append(f'<span class="visual" {tip([f"tokens {place} to {place + run.count - 1}"])}>{run.count:,} visual tokens</span>')
            place += run.count
            continue
        inner = []
        for piece in run.pieces:
            ids = " ".join(map(str, piece.ids))
            shown = piece.text.replace("\n", "\u21b5\n")
            inner.append(f"<s {tip([f'token {place}, id {ids}'])}>{text(shown)}</s>")
            place += len(piece.ids)
        parts.append(f'<span class="{run.kind}">{"".join(inner)}</span>')
    return "".join(parts)


def picture(view: PictureView) -> str:
    """The original with the grid over it, and what the encoder gets."""
    small = " small" if max(view.width, view.height) <= _SHOWN_PX else ""
    width, height = view.resized_px
    grid = f"{plural(view.cols, view.unit)} x {view.rows}" if view.cols * view.rows > 1 or view.unit == "patch" else f"one {view.unit}"
    extra = {"none": "", "first": " after the whole picture", "last": " and the whole picture"}[view.thumbnail]
    time = f" at {view.time_s:g} s" if view.time_s is not None else ""
    labels = (
        f"{len({v for row in view.labels for v in row} - {view.background})} classes"
        if view.labels
        else plural(view.tokens, "visual token")
    )
    caption = f"{view.file}{time}: {view.width} x {view.height} px, resized to {width} x {height} px, {grid}{extra}; {labels}"
    return (
        f'<div class="picture{small}"><div class="views"><div><small>original, grid over it</small>{_over(view)}</div>'
        f"<div><small>what the encoder gets</small>{_tiles(view)}</div></div>{text(caption)}</div>"
    )


def _over(view: PictureView) -> str:
    """SVG of the original under its grid; the units are the original's pixels."""
    frame, width, height = view.frame, view.width, view.height
    x0, y0 = min(0.0, frame.x0) * width, min(0.0, frame.y0) * height
    x1, y1 = max(1.0, frame.x1) * width, max(1.0, frame.y1) * height
    scale = _SHOWN_PX / max(x1 - x0, y1 - y0)
    shown = max(24.0, (x1 - x0) * scale), max(24.0, (y1 - y0) * scale)
    if view.original is None:
        return f'<div class="unread" style="width:{shown[0]:.0f}px;height:{shown[1]:.0f}px">unreadable</div>'
    left, top, right, bottom = frame.x0 * width, frame.y0 * height, frame.x1 * width, frame.y1 * height
    lines = [f"M{left:.2f} {top:.2f}H{right:.2f}V{bottom:.2f}H{left:.2f}Z"]
    lines += [f"M{left + (right - left) * i / view.cols:.2f} {top:.2f}V{bottom:.2f}" for i in range(1, view.cols)]
    lines += [f"M{left:.2f} {top + (bottom - top) * i / view.rows:.2f}H{right:.2f}" for i in range(1, view.rows)]
    path = "".join(lines)
    thin = 0.6 if view.unit == "patch" else 1.4
    return (
        f'<svg class="over" width="{shown[0]:.0f}" height="{shown[1]:.0f}" viewBox="{x0:.2f} {y0:.2f} {x1 - x0:.2f} {y1 - y0:.2f}" '
        f'preserveAspectRatio="none"><image href="{view.original}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
        f'<g fill="none" vector-effect="non-scaling-stroke">'
        f'<path d="{path}" stroke="#000" stroke-opacity=".45" stroke-width="{thin + 1.2}" vector-effect="non-scaling-stroke"/>'
        f'<path class="grid" d="{path}" stroke="#ffd23f" stroke-width="{thin}" vector-effect="non-scaling-stroke"/></g></svg>'
    )


def _tiles(view: PictureView) -> str:
    if view.labels:
        return _labelled(view)
    tile_px = max(36, min(_SHOWN_PX, _SHOWN_PX // max(1, min(view.cols, 4)))) if view.unit == "tile" else _SHOWN_PX
    if view.unit == "patch":
        width = round(_SHOWN_PX * min(1.0, view.cols / view.rows))
        return f'<div class="tiles" style="width:{max(24, width)}px"><img src="{view.tiles[0]}" alt=""></div>'
    whole = {"first": view.tiles[:1], "last": view.tiles[-1:], "none": ()}[view.thumbnail]
    cut = {"first": view.tiles[1:], "last": view.tiles[:-1], "none": view.tiles}[view.thumbnail]
    images = "".join(f'<img src="{uri}" alt="" {tip([f"tile {i + 1} of {len(cut)}"])}>' for i, uri in enumerate(cut))
    grid = f'<div class="tiles" style="grid-template-columns:repeat({view.cols},{tile_px}px)">{images}</div>'
    if not whole:
        return grid
    small = f'<div class="tiles" style="width:{max(tile_px, 64)}px"><img src="{whole[0]}" alt="" {tip(["the whole picture"])}></div>'
    order = (small, grid) if view.thumbnail == "first" else (grid, small)
    return f'<div class="views" style="gap:8px">{order[0]}{order[1]}</div>'


def _labelled(view: PictureView) -> str:
    """The tile with the class of each patch over it; the background stays clear."""
    rows, cols = len(view.labels), len(view.labels[0])
    cells = []
    for y, row in enumerate(view.labels):
        for x, label in enumerate(row):
            if label == view.background:
                continue
            cells.append(f'<rect x="{x}" y="{y}" width="1" height="1" fill="hsl({hue(label)} 70% 50%)" fill-opacity=".42"/>')
            if rows * cols <= _MAX_LABELLED_PATCHES:
                cells.append(f'<text x="{x + 0.5}" y="{y + 0.72}">{label}</text>')
    side = _SHOWN_PX
    return (
        f'<svg class="over labels" width="{side}" height="{side}" viewBox="0 0 {cols} {rows}">'
        f'<image href="{view.tiles[0]}" width="{cols}" height="{rows}" preserveAspectRatio="none"/>{"".join(cells)}</svg>'
    )
