"""Grounding text: what is written is read back within the grid, other people's parsers read it too, and no text breaks the reader."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.data.demo_talk import box_text
from megavlm.data.grounding import (
    NOTATIONS,
    GroundedBox,
    GroundedPoint,
    GroundingError,
    format_box,
    format_boxes,
    format_points,
    parse_boxes,
    parse_points,
)
from megavlm.evaluation.boxes import parse_box

CELLS = {"megavlm": 999, "qwen-vl": 999, "qwen2-vl": 1000, "qwen2.5-vl": None, "internvl": 1000, "kosmos-2": 32}
EXAMPLES = {
    "megavlm": "a cat: 031 250 500 999",
    "qwen-vl": "<ref>a cat</ref><box>(31,250),(500,999)</box>",
    "qwen2-vl": "<|object_ref_start|>a cat<|object_ref_end|><|box_start|>(31,250),(500,1000)<|box_end|>",
    "qwen2.5-vl": '[{"bbox_2d": [20, 120, 320, 480], "label": "a cat"}]',
    "internvl": "<ref>a cat</ref><box>[[31, 250, 500, 1000]]</box>",
    "kosmos-2": "<phrase>a cat</phrase><object><patch_index_0257><patch_index_1007></object>",
}
quick = settings(max_examples=30, derandomize=True, deadline=None)


PHRASES = st.none() | st.text(st.characters(exclude_characters="<\n", exclude_categories=["Cs"]), min_size=1, max_size=6)
FRACTIONS = st.tuples(*[st.floats(0, 1, width=32)] * 4)


@st.composite
def pictures(draw):
    """(width, height, boxes with phrases)."""
    width, height = draw(st.integers(1, 5000)), draw(st.integers(1, 5000))
    boxes = []
    for phrase, (a, b, c, d) in draw(st.lists(st.tuples(PHRASES, FRACTIONS), min_size=1, max_size=3)):
        (x0, x1), (y0, y1) = sorted((a * width, c * width)), sorted((b * height, d * height))
        if x1 - x0 > 1e-3 and y1 - y0 > 1e-3:
            boxes.append(GroundedBox((phrase or "").strip() or None, (x0, y0, x1, y1)))
    return width, height, boxes or [GroundedBox(None, (0, 0, width, height))]


def test_examples_and_names():
    assert set(EXAMPLES) == set(NOTATIONS) and NOTATIONS[0] == "megavlm"
    for notation, text in EXAMPLES.items():
        assert format_box((20, 120, 320, 480), 640, 480, notation, "a cat") == text
        (found,) = parse_boxes(f"{text}", 640, 480, notation)
        assert found.phrase == "a cat"
        cell = 640 / (CELLS[notation] or 640)
        assert found.box_px == pytest.approx((20, 120, 320, 480), abs=cell)


@pytest.mark.parametrize("notation", NOTATIONS)
@quick
@given(picture=pictures())
def test_round_trip_within_the_grid(notation, picture):
    width, height, boxes = picture
    found = parse_boxes(format_boxes(boxes, width, height, notation), width, height, notation)
    assert [b.phrase for b in found] == [b.phrase for b in boxes]
    for wanted, got in zip(boxes, found, strict=True):
        for i, side in enumerate((width, height) * 2):
            cell = side / (CELLS[notation] or side)
            thin = wanted.box_px[i % 2 + 2] - wanted.box_px[i % 2] < cell
            bound = cell if thin or notation == "kosmos-2" else cell / 2
            assert abs(wanted.box_px[i] - got.box_px[i]) <= bound * (1 + 1e-9)
        assert got.box_px[0] < got.box_px[2] and got.box_px[1] < got.box_px[3]
    again = parse_boxes(format_boxes(found, width, height, notation), width, height, notation)
    if notation != "kosmos-2":
        assert [b.box_px for b in again] == [pytest.approx(b.box_px) for b in found], "what was read is on the grid"


@quick
@given(picture=pictures())
def test_kosmos_patches_equal_transformers(picture):
    from transformers.models.kosmos2 import processing_kosmos2 as theirs

    width, height, boxes = picture
    for box in boxes:
        x0, y0, x1, y1 = box.box_px
        pair = theirs.coordinate_to_patch_index((x0 / width, y0 / height, x1 / width, y1 / height), 32)
        text = format_box(box.box_px, width, height, "kosmos-2", "x")
        assert text == f"<phrase>x</phrase><object><patch_index_{pair[0]:04d}><patch_index_{pair[1]:04d}></object>"
    text = format_boxes(boxes, width, height, "kosmos-2")
    _, entities = theirs.clean_text_and_extract_entities_with_bboxes(text)
    relative = [box for *_, group in entities for box in group]
    ours = parse_boxes(text, width, height, "kosmos-2")
    assert [b.box_px for b in ours] == [pytest.approx((a * width, b * height, c * width, d * height)) for a, b, c, d in relative]


def test_their_evaluation_patterns_read_our_text():
    """The expressions of Qwen-VL's and InternVL's evaluate_grounding.py, and their divisors."""
    box = (20, 120, 320, 480)
    text = format_box(box, 640, 480, "qwen-vl", "a cat")
    (a, b), (c, d) = ((float(v) for v in corner.split(",")) for corner in re.findall(r"\((.*?)\),\((.*?)\)", text)[0])
    assert [a / 999 * 640, b / 999 * 480, c / 999 * 640, d / 999 * 480] == pytest.approx(box, abs=0.4)
    text = format_box(box, 640, 480, "internvl", "a cat")
    a, b, c, d = (float(v) / 1000 for v in re.findall(r"\[*\[(.*?),(.*?),(.*?),(.*?)\]\]*", text)[0])
    assert [a * 640, b * 480, c * 640, d * 480] == pytest.approx(box, abs=0.4)


@quick
@given(st.lists(st.integers(0, 63), min_size=2, max_size=2, unique=True), st.lists(st.integers(0, 63), min_size=2, max_size=2, unique=True))
def test_our_plain_boxes_are_the_demonstrations(xs, ys):
    (x0, x1), (y0, y1) = sorted(xs), sorted(ys)
    per_mille = tuple(round(999 * v / 64) for v in (x0, y0, x1, y1))
    text = format_box((x0, y0, x1, y1), 64, 64, "megavlm")
    assert text == box_text(per_mille)
    assert parse_box(text) == per_mille


def test_neighbours_share_a_phrase():
    boxes = [GroundedBox("cat", (0, 0, 10, 10)), GroundedBox("cat", (5, 5, 20, 20)), GroundedBox("dog", (0, 0, 32, 32))]
    assert format_boxes(boxes, 32, 32, "kosmos-2").count("<phrase>cat</phrase>") == 1
    assert format_boxes(boxes, 32, 32, "internvl") == (
        "<ref>cat</ref><box>[[0, 0, 312, 312], [156, 156, 625, 625]]</box>\n<ref>dog</ref><box>[[0, 0, 1000, 1000]]</box>"
    )
    assert format_boxes(boxes, 32, 32, "qwen-vl").startswith(
        "<ref>cat</ref><box>(0,0),(312,312)</box><box>(156,156),(624,624)</box>\n<ref>dog"
    )


@pytest.mark.parametrize("notation", NOTATIONS)
def test_boxes_are_found_in_sentences(notation):
    text = f"Here it is:\n{EXAMPLES[notation]}\nand that is all."
    assert [b.phrase for b in parse_boxes(text, 640, 480, notation)] == ["a cat"]
    fenced = '```json\n[\n\t{"bbox_2d": [1, 2, 3, 4], "label": "é"},\n\t{"bbox_2d": [5.5, 6, 7, 8]}\n]\n```'
    assert parse_boxes(fenced, 9, 9, "qwen2.5-vl") == [GroundedBox("é", (1, 2, 3, 4)), GroundedBox(None, (5.5, 6, 7, 8))]


@pytest.mark.parametrize("notation", NOTATIONS)
@quick
@given(data=st.data())
def test_malformed_text_is_no_box_and_never_raises(notation, data):
    example = EXAMPLES[notation]
    pieces = st.sampled_from([example[i:j] for i in range(0, len(example), 5) for j in range(i + 1, len(example) + 1, 7)])
    text = "".join(data.draw(st.lists(pieces | st.text(max_size=6), max_size=8)))
    for box in parse_boxes(text, 640, 480, notation):
        x0, y0, x1, y1 = box.box_px
        assert 0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 480


@pytest.mark.parametrize(
    ("notation", "text"),
    [
        ("megavlm", "031 250 500"),
        ("megavlm", "500 250 031 999"),
        ("megavlm", "1 2 3 4"),
        ("megavlm", "٠٣١ 250 500 999"),
        ("qwen-vl", "<box>(31,250),(500,1001)</box>"),
        ("qwen-vl", "<box>(500,250),(31,999)</box>"),
        ("internvl", "<ref>a</ref><box>[[1, 2, 3]]</box>"),
        ("internvl", "<ref>a</ref><box>[[1, 2, 3, 4]"),
        ("qwen2.5-vl", '[{"bbox_2d": [1, 2, true, 4]}]'),
        ("qwen2.5-vl", '[{"bbox_2d": [1, 2, NaN, Infinity]}]'),
        ("qwen2.5-vl", '[{"bbox_2d": [1, 2, 641, 4]}]'),
        ("qwen2.5-vl", '[{"bbox_2d": "1, 2, 3, 4"}]'),
        ("qwen2.5-vl", "[" * 20000),
        ("internvl", "<box>[[1," + " " * 20000 + "2, 3, x"),
        ("qwen2.5-vl", '[{"bbox_2d": [1, 2, 3, ' + "9" * 5000 + "]}]"),
        ("kosmos-2", "<object><patch_index_0863><patch_index_0044></object>"),
        ("kosmos-2", "<object><patch_index_0044><patch_index_1024></object>"),
    ],
)
def test_what_is_not_a_box(notation, text):
    assert parse_boxes(text, 640, 480, notation) == []


@pytest.mark.parametrize(
    ("box", "phrase", "notation", "message"),
    [
        ((0, 0, 10, 10), None, "qwen3", "not one of megavlm"),
        ((5, 0, 5, 10), None, "internvl", "no area"),
        ((-2, 0, 5, 10), None, "internvl", "stands out of its picture"),
        ((0, 0, 5, float("nan")), None, "internvl", "not finite"),
        ((33, 0, 32.5, 10), None, "internvl", "no area"),
        ((0, 0, 5, 5), "a</ref>", "qwen-vl", "contains '</ref>'"),
        ((0, 0, 5, 5), "a\nb", "megavlm", "contains"),
        ((0, 0, 5, 5), " a", "internvl", "spaces at its ends"),
    ],
)
def test_what_cannot_be_written_says_why(box, phrase, notation, message):
    with pytest.raises(GroundingError, match=re.escape(message)):
        format_box(box, 32, 32, notation, phrase)


def test_sizes_and_empty_lists_are_refused():
    with pytest.raises(GroundingError, match="0x5"):
        parse_boxes("", 0, 5, "megavlm")
    with pytest.raises(GroundingError, match="no box"):
        format_boxes([], 5, 5, "megavlm")
    assert format_box((-0.4, 0, 32.4, 32), 32, 32, "megavlm") == "000 000 999 999", "an annotation's rounding ends at the edge"


@quick
@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0, 1), st.floats(0, 1))
def test_points_round_trip(width, height, x, y):
    point = GroundedPoint("a: b", (x * width, y * height))
    for notation, cells in (("megavlm", (999, 999)), ("qwen2.5-vl", (width, height))):
        (found,) = parse_points(format_points([point], width, height, notation), width, height, notation)
        assert found.phrase == "a: b"
        assert all(abs(found.point_px[i] - point.point_px[i]) <= (width, height)[i] / cells[i] / 2 * (1 + 1e-9) for i in (0, 1))


def test_notations_without_points_say_so():
    with pytest.raises(GroundingError, match="has no points"):
        format_points([GroundedPoint(None, (1, 1))], 5, 5, "internvl")
    with pytest.raises(GroundingError, match="has no points"):
        parse_points("", 5, 5, "kosmos-2")
    with pytest.raises(GroundingError, match="outside the picture"):
        format_points([GroundedPoint(None, (6, 1))], 5, 5, "megavlm")
    assert parse_points("265 624\n1 2\n999 1000", 100, 100, "megavlm") == [GroundedPoint(None, (26500 / 999, 62400 / 999))]
