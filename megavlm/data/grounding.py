"""Boxes and points as text, and back, in the notations of the model families.

| notation | one box | numbers |
|---|---|---|
| megavlm | `a cat: 031 250 500 999` | x0 y0 x1 y1, 0-999 of the picture's sides, three figures |
| qwen-vl | `<ref>a cat</ref><box>(31,250),(500,999)</box>` | 0-999 |
| qwen2-vl | `<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(31,250),(500,1000)<|box_end|>` | 0-1000 |
| qwen2.5-vl | `[{"bbox_2d": [20, 120, 320, 480], "label": "a cat"}]` | pixels of the picture as the encoder sees it |
| internvl | `<ref>a cat</ref><box>[[31, 250, 500, 1000]]</box>` | 0-1000 |
| kosmos-2 | `<phrase>a cat</phrase><object><patch_index_0257><patch_index_1007></object>` | cells of a 32 x 32 grid |

Sources: Qwen-VL `eval_mm/evaluate_grounding.py` (reads with 999) and the paper, arXiv 2308.12966, section 3; Qwen2-VL, arXiv
2409.12191, section 2.3, [0, 1000); Qwen2.5-VL cookbooks, `spatial_understanding.ipynb`; InternVL `eval/refcoco/evaluate_grounding.py`
(reads with 1000) and its documentation's "Grounding / Detection Data"; transformers `models/kosmos2/processing_kosmos2.py`.

Numbers are rounded to the notation's grid: an edge moves by at most half a cell, by less than a whole one where a thinner box would have
lost its area, and by at most one cell with kosmos-2.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

BoxPx = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels; x0 < x1 and y0 < y1."""
Size = tuple[int, int]
"""Width and height in pixels."""
EDGE_TOLERANCE_PX = 1.0
"""A box may stand out of its picture by this much (annotations' rounding); it then ends at the picture's edge."""
KOSMOS_CELLS = 32
"""Cells along each side of kosmos-2's grid."""


class GroundingError(ValueError):
    """A box, phrase or notation that cannot be written."""


@dataclass(frozen=True)
class GroundedBox:
    """A place in a picture and what it is called."""

    phrase: str | None
    box_px: BoxPx


@dataclass(frozen=True)
class GroundedPoint:
    """A point in a picture and what it is called."""

    phrase: str | None
    point_px: tuple[float, float]


@dataclass(frozen=True)
class _Notation:
    write: Callable[[str | None, Sequence[BoxPx], Size], str]
    """Text of one phrase and all its boxes."""
    read: Callable[[str, Size], Iterator[GroundedBox]]
    markup: tuple[str, ...]
    """What a phrase must not contain, or it could not be read back."""
    join: str = ""
    """Between the texts of two phrases."""
    frame: tuple[str, str] = ("", "")
    """Round all of it."""


def format_box(box_px: Sequence[float], width: int, height: int, notation: str, phrase: str | None = None) -> str:
    """One box as text. Arguments and errors as in `format_boxes`."""
    x0, y0, x1, y1 = box_px
    return format_boxes([GroundedBox(phrase, (x0, y0, x1, y1))], width, height, notation)


def format_boxes(boxes: Sequence[GroundedBox], width: int, height: int, notation: str) -> str:
    """Boxes as text, in order; neighbours with the same phrase share it where the notation can say so.

    Args:
        boxes: in pixels of a picture of `width` x `height`.
        width, height: the picture's; for qwen2.5-vl of the picture as the encoder sees it, since its numbers are pixels.
        notation: a name in NOTATIONS.

    Raises:
        GroundingError: unknown notation, no box, a box without area or outside the picture, a phrase that could not be read back.
    """
    how = _notation(notation)
    size = _checked_size(width, height)
    if not boxes:
        raise GroundingError("no box to write")
    for box in boxes:
        _check_phrase(box.phrase, how.markup, notation)
    groups = [(phrase, [_inside(b.box_px, size) for b in group]) for phrase, group in groupby(boxes, key=lambda b: b.phrase)]
    return how.frame[0] + how.join.join(how.write(phrase, group, size) for phrase, group in groups) + how.frame[1]


def parse_boxes(text: str, width: int, height: int, notation: str) -> list[GroundedBox]:
    """Boxes that `text` names, in pixels, in order. What is not a box of this notation (also one without area or with numbers outside the
    grid) is passed over: it is what a model wrote. Raises GroundingError only for an unknown notation or size.
    """
    return list(_notation(notation).read(text, _checked_size(width, height)))


def format_points(points: Sequence[GroundedPoint], width: int, height: int, notation: str) -> str:
    """Points as text: megavlm (`a cat: 265 624`) and qwen2.5-vl (`[{"point_2d": [170, 300], "label": "a cat"}]`).

    Raises:
        GroundingError: as format_boxes, and for the notations that have no points.
    """
    how, size = _notation(notation), _checked_size(width, height)
    texts = []
    for point in points:
        _check_phrase(point.phrase, how.markup, notation)
        x, y = point.point_px
        if not (0 <= x <= width and 0 <= y <= height):
            raise GroundingError(f"point {point.point_px} lies outside the picture of {width}x{height}")
        if notation == "megavlm":
            texts.append(_named(point.phrase) + f"{round(x * _MEGAVLM / width):03d} {round(y * _MEGAVLM / height):03d}")
        elif notation == "qwen2.5-vl":
            texts.append(_json_item("point_2d", [round(x), round(y)], point.phrase))
    if notation not in _POINTS:
        raise GroundingError(f"notation {notation!r} has no points: use {' or '.join(_POINTS)}")
    if not texts:
        raise GroundingError(f"no point to write in a picture of {size[0]}x{size[1]}")
    return how.frame[0] + how.join.join(texts) + how.frame[1]


def parse_points(text: str, width: int, height: int, notation: str) -> list[GroundedPoint]:
    """Points that `text` names, as parse_boxes. Raises GroundingError for an unknown notation, or one without points."""
    _notation(notation)
    size = _checked_size(width, height)
    if notation == "megavlm":
        found = (_MEGAVLM_POINT.fullmatch(line.strip()) for line in text.split("\n"))
        grid = [(m["phrase"], (int(m["x"]) * width / _MEGAVLM, int(m["y"]) * height / _MEGAVLM)) for m in found if m]
    elif notation == "qwen2.5-vl":
        grid = [(_label(item), (v[0], v[1])) for item in _json_items(text) if (v := _numbers(item.get("point_2d"), 2)) is not None]
    else:
        raise GroundingError(f"notation {notation!r} has no points: use {' or '.join(_POINTS)}")
    return [GroundedPoint(phrase, (x, y)) for phrase, (x, y) in grid if 0 <= x <= size[0] and 0 <= y <= size[1]]


# ------------------------------------------------------------------------------------------------------------------ checks


def _notation(name: str) -> _Notation:
    if name not in NOTATIONS:
        raise GroundingError(f"notation {name!r} is not one of {', '.join(NOTATIONS)}")
    return _BY_NAME[name]


def _checked_size(width: int, height: int) -> Size:
    if width < 1 or height < 1:
        raise GroundingError(f"a picture of {width}x{height} pixels has no place for a box")
    return width, height


def _check_phrase(phrase: str | None, markup: Sequence[str], notation: str) -> None:
    if phrase is None:
        return
    if not phrase or phrase != phrase.strip():
        raise GroundingError(f"phrase {phrase!r} is empty or has spaces at its ends: strip it, or give None")
    for text in markup:
        if text in phrase:
            raise GroundingError(f"phrase {phrase!r} contains {text!r}, which means something else in notation {notation!r}")


def _inside(box: BoxPx, size: Size) -> BoxPx:
    x0, y0, x1, y1 = box
    slack, (width, height) = EDGE_TOLERANCE_PX, size
    if not all(math.isfinite(v) for v in box):
        raise GroundingError(f"box {box} is not finite")
    if x0 < -slack or y0 < -slack or x1 > width + slack or y1 > height + slack:
        raise GroundingError(f"box {box} stands out of its picture of {width}x{height} pixels by more than {slack:g}")
    kept = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
    if not (kept[0] < kept[2] and kept[1] < kept[3]):
        raise GroundingError(f"box {box} (x0, y0, x1, y1) has no area in a picture of {width}x{height} pixels")
    return kept


# -------------------------------------------------------------------------------------------------------------------- grids


def _to_grid(box: BoxPx, size: Size, grid: Size) -> tuple[int, int, int, int]:
    """The box in whole numbers, `grid` standing for the right and lower edge; never without area."""
    (x0, x1), (y0, y1) = (_interval(box[i] * grid[i] / size[i], box[i + 2] * grid[i] / size[i]) for i in (0, 1))
    return x0, y0, x1, y1


def _interval(low: float, high: float) -> tuple[int, int]:
    a, b = round(low), round(high)
    return (a, b) if a < b else (math.floor(low), math.ceil(high))


def _from_grid(values: Sequence[float], size: Size, grid: Size) -> BoxPx | None:
    x0, y0, x1, y1 = values
    if not (0 <= x0 < x1 <= grid[0] and 0 <= y0 < y1 <= grid[1]):
        return None
    return x0 * size[0] / grid[0], y0 * size[1] / grid[1], x1 * size[0] / grid[0], y1 * size[1] / grid[1]


# ------------------------------------------------------------------------------------------------------------------ megavlm

_MEGAVLM = 999
_FOUR = " ".join(rf"(?P<{name}>[0-9]{{3}})" for name in ("x0", "y0", "x1", "y1"))
_MEGAVLM_BOX = re.compile(rf"(?:(?P<phrase>.*\S): )?{_FOUR}")
_MEGAVLM_POINT = re.compile(r"(?:(?P<phrase>.*\S): )?(?P<x>[0-9]{3}) (?P<y>[0-9]{3})")


def _named(phrase: str | None) -> str:
    return "" if phrase is None else f"{phrase}: "


def _write_megavlm(phrase: str | None, boxes: Sequence[BoxPx], size: Size) -> str:
    grid = (_MEGAVLM, _MEGAVLM)
    return "\n".join(_named(phrase) + " ".join(f"{v:03d}" for v in _to_grid(box, size, grid)) for box in boxes)


def _read_megavlm(text: str, size: Size) -> Iterator[GroundedBox]:
    for line in text.split("\n"):
        match = _MEGAVLM_BOX.fullmatch(line.strip())
        if match is not None:
            yield from _kept(match["phrase"], [int(match[k]) for k in ("x0", "y0", "x1", "y1")], size, (_MEGAVLM, _MEGAVLM))


def _kept(phrase: str | None, values: Sequence[float], size: Size, grid: Size) -> Iterator[GroundedBox]:
    box = _from_grid(values, size, grid)
    if box is not None:
        yield GroundedBox(phrase, box)


# ------------------------------------------------------------------------------------- tagged: Qwen-VL, Qwen2-VL, InternVL


def _tagged(grid: int, tags: tuple[str, str, str, str], one: str, nested: bool) -> _Notation:
    """`<ref>phrase</ref><box>...</box>`. `one`: a box's numbers with {} for each; nested: all boxes of a phrase in one list."""
    ref, end_ref, box_tag, end_box = tags
    number = re.escape(one).replace(r"\{\}", r"\s*([0-9]{1,4})\s*").replace(r",\ ", ",")
    several = rf"\[\s*{number}(?:\s*,\s*{number})*\s*\]" if nested else number
    # A phrase names the boxes of its own line: what stands on the next line without a phrase has none.
    boxes = rf"{re.escape(box_tag)}\s*{several}\s*{re.escape(end_box)}[ \t]*"
    named = rf"{re.escape(ref)}(?P<phrase>(?:(?!{re.escape(ref)}).)*?){re.escape(end_ref)}\s*"
    item = re.compile(rf"(?:{named})?(?P<boxes>(?:{boxes})+)", re.S)
    single = re.compile(number)

    def write(phrase: str | None, group: Sequence[BoxPx], size: Size) -> str:
        texts = [one.format(*_to_grid(box, size, (grid, grid))) for box in group]
        head = "" if phrase is None else f"{ref}{phrase}{end_ref}"
        return head + (f"{box_tag}[{', '.join(texts)}]{end_box}" if nested else "".join(f"{box_tag}{t}{end_box}" for t in texts))

    def read(text: str, size: Size) -> Iterator[GroundedBox]:
        for match in item.finditer(text):
            phrase = (match["phrase"] or "").strip() or None
            for box in single.finditer(match["boxes"]):
                yield from _kept(phrase, [int(v) for v in box.groups()], size, (grid, grid))

    return _Notation(write, read, markup=tags, join="\n")


# ----------------------------------------------------------------------------------------------------------- Qwen2.5-VL JSON

_JSON_START = re.compile(r"[\[{]")
_JSON_OPENING = re.compile(r"[\[{\s]+")


def _json_item(key: str, numbers: list[int], phrase: str | None) -> str:
    return json.dumps({key: numbers} | ({} if phrase is None else {"label": phrase}), ensure_ascii=False)


def _write_json(phrase: str | None, boxes: Sequence[BoxPx], size: Size) -> str:
    return ", ".join(_json_item("bbox_2d", list(_to_grid(box, size, size)), phrase) for box in boxes)


def _json_items(text: str) -> Iterator[dict[str, Any]]:
    """Objects of the JSON lists and objects in `text`, whatever stands round them (a fence, a sentence)."""
    decoder, at = json.JSONDecoder(), 0
    while (start := _JSON_START.search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, start.start())
        except ValueError:
            at = start.end()
            continue
        except RecursionError:
            opening = _JSON_OPENING.match(text, start.start())
            assert opening is not None
            at = opening.end()  # thousands of brackets in a row: trying each in turn would take quadratic time
            continue
        yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict))


def _numbers(value: Any, count: int) -> list[float] | None:
    if not isinstance(value, list) or len(value) != count:
        return None
    if not all(isinstance(v, int | float) and not isinstance(v, bool) and abs(v) < 1e9 for v in value):
        return None
    return [float(v) for v in value]


def _label(item: dict[str, Any]) -> str | None:
    label = item.get("label")
    return label if isinstance(label, str) and label else None


def _read_json(text: str, size: Size) -> Iterator[GroundedBox]:
    for item in _json_items(text):
        values = _numbers(item.get("bbox_2d"), 4)
        if values is not None:
            yield from _kept(_label(item), values, size, size)


# ------------------------------------------------------------------------------------------------------------------ Kosmos-2

_PATCH = r"<patch_index_([0-9]{1,4})>"
_MORE = "</delimiter_of_multi_objects/>"
_KOSMOS = re.compile(rf"(?:<phrase>(?P<phrase>[^<]*)</phrase>)?<object>(?P<boxes>{_PATCH}{_PATCH}(?:{_MORE}{_PATCH}{_PATCH})*)</object>")
_KOSMOS_PAIR = re.compile(_PATCH + _PATCH)


def _write_kosmos(phrase: str | None, boxes: Sequence[BoxPx], size: Size) -> str:
    pairs = []
    for box in boxes:
        x0, y0 = (math.floor(box[i] / size[i] * KOSMOS_CELLS) for i in (0, 1))
        x1, y1 = (math.ceil(box[i + 2] / size[i] * KOSMOS_CELLS - 1) for i in (0, 1))
        pairs.append(f"<patch_index_{y0 * KOSMOS_CELLS + x0:04d}><patch_index_{y1 * KOSMOS_CELLS + x1:04d}>")
    return ("" if phrase is None else f"<phrase>{phrase}</phrase>") + f"<object>{_MORE.join(pairs)}</object>"


def _read_kosmos(text: str, size: Size) -> Iterator[GroundedBox]:
    """Corners lie in the middle of their cells, except that boxes of one row or column of cells are whole cells (processing_kosmos2)."""
    for match in _KOSMOS.finditer(text):
        for pair in _KOSMOS_PAIR.finditer(match["boxes"]):
            first, last = int(pair[1]), int(pair[2])
            (y0, x0), (y1, x1) = divmod(first, KOSMOS_CELLS), divmod(last, KOSMOS_CELLS)
            if first >= KOSMOS_CELLS**2 or last >= KOSMOS_CELLS**2 or x1 < x0 or y1 < y0:
                continue
            inset = 0.0 if x0 == x1 or y0 == y1 else 0.5
            values = (x0 + inset, y0 + inset, x1 + 1 - inset, y1 + 1 - inset)
            yield from _kept((match["phrase"] or "").strip() or None, values, size, (KOSMOS_CELLS, KOSMOS_CELLS))


_QWEN2 = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
_TAGS = ("<ref>", "</ref>", "<box>", "</box>")
_POINTS = ("megavlm", "qwen2.5-vl")
_BY_NAME: dict[str, _Notation] = {
    "megavlm": _Notation(_write_megavlm, _read_megavlm, markup=("\n",), join="\n"),
    "qwen-vl": _tagged(999, _TAGS, "({},{}),({},{})", nested=False),
    "qwen2-vl": _tagged(1000, _QWEN2, "({},{}),({},{})", nested=False),
    "qwen2.5-vl": _Notation(_write_json, _read_json, markup=(), join=", ", frame=("[", "]")),
    "internvl": _tagged(1000, _TAGS, "[{}, {}, {}, {}]", nested=True),
    "kosmos-2": _Notation(_write_kosmos, _read_kosmos, markup=("<",)),
}
NOTATIONS: tuple[str, ...] = tuple(_BY_NAME)
"""Names of the notations; the first is our own."""
