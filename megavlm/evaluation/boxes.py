"""Boxes in text: four integers 0-999 (x0 y0 x1 y1, thousandths of the picture's sides), read and compared."""

from __future__ import annotations

import re

Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in thousandths of the picture's width and height; x0 < x1 and y0 < y1."""
GRID = 999
"""The number that stands for the right or lower edge."""
_BOX = re.compile(r"[\[(]?\s*(\d{1,3})\s*[\s,]\s*(\d{1,3})\s*[\s,]\s*(\d{1,3})\s*[\s,]\s*(\d{1,3})\s*[\])]?")
_THREE_FIGURES = re.compile(r"\d{3}( \d{3}){3}")


def parse_box(text: str) -> Box | None:
    """The box that `text` is: four integers apart by spaces or commas, brackets around them allowed. None for anything else.

    Other words, a fifth number, and boxes without area are "anything else": what is not a box is a wrong answer.
    """
    match = _BOX.fullmatch(text.strip())
    if match is None:
        return None
    x0, y0, x1, y1 = (int(v) for v in match.groups())
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None


def is_box_text(text: str) -> bool:
    """True for a box as megavlm's own data write it: three figures each, so that no list of small numbers is taken for a box."""
    return _THREE_FIGURES.fullmatch(text.strip()) is not None and parse_box(text) is not None


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of two boxes, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / (_area(a) + _area(b) - shared)


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])
