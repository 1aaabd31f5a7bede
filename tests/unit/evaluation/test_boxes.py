"""Boxes in text, and their overlap against a count of pixels."""

import random

import numpy as np
import pytest

from megavlm.data.demo_talk import box_text
from megavlm.evaluation.boxes import box_iou, is_box_text, parse_box


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("012 034 560 789", (12, 34, 560, 789)),
        (" 12 34 560 789\n", (12, 34, 560, 789)),
        ("[12, 34, 560, 789]", (12, 34, 560, 789)),
        ("(12,34,560,789)", (12, 34, 560, 789)),
        ("000 000 999 999", (0, 0, 999, 999)),
        ("12 34 560", None),
        ("12 34 560 789 3", None),
        ("560 034 012 789", None),
        ("012 034 012 789", None),
        ("012 034 560 1789", None),
        ("-12 34 560 789", None),
        ("box 12 34 560 789", None),
        ("1.2 3.4 5.6 7.8", None),
        ("", None),
    ],
)
def test_parse(text, box):
    assert parse_box(text) == box


def test_what_the_data_write_is_read_back():
    box = (3, 40, 57, 999)
    assert parse_box(box_text(box)) == box
    assert is_box_text(box_text(box))
    assert not is_box_text("1 2 3 4"), "a sorted list of digits is no box"
    assert not is_box_text("3 digits: 1 2 4")


def test_iou_equals_counting_pixels():
    draw = random.Random(0)
    for _ in range(200):
        boxes = []
        for _ in range(2):
            x0, x1 = sorted(draw.sample(range(31), 2))
            y0, y1 = sorted(draw.sample(range(31), 2))
            boxes.append((x0, y0, x1, y1))
        grids = [np.zeros((30, 30), dtype=bool) for _ in boxes]
        for grid, (x0, y0, x1, y1) in zip(grids, boxes, strict=True):
            grid[y0:y1, x0:x1] = True
        expected = (grids[0] & grids[1]).sum() / (grids[0] | grids[1]).sum()
        assert box_iou(*boxes) == pytest.approx(expected)
