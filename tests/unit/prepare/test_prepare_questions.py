"""Questions with answers, and COCO's captions and boxes."""

from __future__ import annotations

import json

import pytest

from megavlm.data.grounding import parse_boxes
from megavlm.data.prepare import PrepareError


def test_vqa_records(pictures, run, lines):
    records = [
        {"id": 5, "question": "Which?", "answers": ["two", "one", "one", "two"], "image": "1.png"},
        {"question": "How many?", "answer": 3, "image": "2.png"},
        {"question": "Capital?", "answers": [{"answer": "Rome"}]},
    ]
    done = run("vqa", lines(*records), images=str(pictures), prompt="{question} Answer briefly.")
    assert done.texts == [
        ["<image>\nWhich? Answer briefly.", "two"],
        ["<image>\nHow many? Answer briefly.", "3"],
        ["Capital? Answer briefly.", "Rome"],
    ]


def test_vqa_all_answers_share_one_weight(pictures, run, lines):
    record = {"question": "Which?", "answers": ["one"] * 3 + ["two"], "image": "1.png"}
    done = run("vqa", lines(record), images=str(pictures), answers="all")
    assert [(s["messages"][1]["content"], s.get("weight")) for s in done.samples] == [("one", 0.75), ("two", 0.25)]
    assert len({s["key"] for s in done.samples}) == 2


def test_vqa_refusals(pictures, run, lines):
    bad = {
        "no question": {"answer": "a"},
        "empty question": {"question": " ", "answer": "a"},
        "no answer": {"question": "?"},
        "empty answer": {"question": "?", "answers": ["", " "]},
        "missing picture": {"question": "?", "answer": "a", "image": "x.png"},
    }
    done = run("vqa", lines({"question": "?", "answer": "a"}, *bad.values()), images=str(pictures))
    assert done.refused == dict.fromkeys(bad, 1)


@pytest.fixture
def vqav2(tmp_path, pictures):
    """Question and annotation files as VQAv2 has them."""
    for i in (1, 2):
        (pictures / f"COCO_val2014_{i:012d}.jpg").write_bytes((pictures / "6.jpg").read_bytes())
    questions = [{"question_id": i * 10, "image_id": i, "question": f"What {i}?"} for i in (1, 2, 3, 4)]
    answers = [{"answer": a, "answer_confidence": "yes", "answer_id": 1} for a in ("no", "yes", "yes")]
    annotations = [{"question_id": i * 10, "answers": answers, "multiple_choice_answer": "yes"} for i in (1, 2, 3)]
    (tmp_path / "q.json").write_text(json.dumps({"info": {"year": 2014}, "license": {}, "data_subtype": "val2014", "questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations, "data_subtype": "val2014"}))
    return tmp_path


def test_vqav2_files(vqav2, pictures, run):
    done = run("vqa", vqav2 / "q.json", annotations=str(vqav2 / "a.json"), images=str(pictures))
    assert done.texts == [[f"<image>\nWhat {i}?", "yes"] for i in (1, 2)]
    assert done.refused == {"missing picture": 1, "question without annotation": 1}
    assert [s["meta"]["id"] for s in done.samples] == [10, 20]


def test_vqav2_needs_annotations(vqav2, run):
    with pytest.raises(PrepareError, match="--annotations"):
        run("vqa", vqav2 / "q.json")


def coco(path, annotations, categories=()):
    images = [{"id": i, "file_name": f"{i}.png", "width": 24 + i, "height": 16} for i in range(4)]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": list(categories)}))
    return path


def test_coco_captions(tmp_path, pictures, run):
    notes = [{"image_id": i, "id": 10 * i + k, "caption": f"caption {k} of {i} "} for k in (0, 1) for i in (0, 1, 2)]
    path = coco(tmp_path / "captions.json", [*notes, {"image_id": 99, "id": 1, "caption": "lost"}])
    done = run("coco", path, images=str(pictures), prompt="Describe.")
    assert [t[1] for t in done.texts] == [f"caption {k} of {i}" for i in (0, 1, 2) for k in (0, 1)]
    assert done.refused == {"picture without annotations": 1, "annotations of an unknown picture": 1}
    assert {s["task"] for s in done.samples} == {"caption"}


CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 9, "name": "traffic light"}]


@pytest.mark.parametrize("notation", ["megavlm", "qwen2-vl", "internvl", "kosmos-2"])
def test_coco_instances_ground_both_ways(notation, tmp_path, pictures, run):
    boxes = [(7, [2, 3, 10, 8]), (9, [0, 0, 24, 16]), (7, [12.5, 4, 6, 6])]
    notes = [{"image_id": 0, "category_id": c, "bbox": b, "iscrowd": 0, "segmentation": [[1, 2, 3, 4]]} for c, b in boxes]
    crowd = {"image_id": 0, "category_id": 7, "bbox": [0, 0, 5, 5], "iscrowd": 1}
    path = coco(tmp_path / "instances.json", [*notes, crowd], CATEGORIES)
    done = run("coco", path, images=str(pictures), notation=notation)
    to_box, to_phrase = done.samples
    assert (to_box["task"], to_phrase["task"]) == ("grounding", "referring")
    contents = [m["content"] for m in to_box["messages"]]
    assert contents[0] == "<image>\nWhere is: cat?" and contents[2] == "Where is: traffic light?"
    # The reader is checked against the model families elsewhere; here it tells whose box is whose.
    step = 24 / (32 if notation == "kosmos-2" else 999) * 1.001
    for answer, category in ((contents[1], 7), (contents[3], 9)):
        truth = [(x, y, x + w, y + h) for c, (x, y, w, h) in boxes if c == category]
        read = [b.box_px for b in parse_boxes(answer, 24, 16, notation)]
        assert len(read) == len(truth)
        assert all(abs(a - b) <= step for got, want in zip(read, truth, strict=True) for a, b in zip(got, want, strict=True))
    assert [m["content"] for m in to_phrase["messages"][1::2]] == ["cat", "traffic light", "cat"]
    assert to_phrase["messages"][0]["content"].startswith("<image>\nWhat is at ")
    assert done.report.tally.notes["crowd regions left out (a box of many things)"] == 1


def test_coco_one_direction_and_faults(tmp_path, pictures, run):
    def note(image, box, category=7):
        return {"image_id": image, "category_id": category, "bbox": box}

    (pictures / "3.png").write_bytes((pictures / "0.png").read_bytes())
    notes = [note(0, [1, 1, 5, 5]), note(1, [1, 1, 500, 5]), note(2, [1, 1, 5, 5], category=1), note(3, [1, 1, 2, 2])]
    path = coco(tmp_path / "instances.json", notes, CATEGORIES)
    done = run("coco", path, images=str(pictures), directions="to-phrase")
    assert [s["task"] for s in done.samples] == ["referring"]
    assert done.refused == {"box that cannot be written": 1, "broken annotation": 1, "picture of another size": 1}


def test_coco_refuses_notations_in_resized_pixels(tmp_path, run):
    path = coco(tmp_path / "instances.json", [])
    with pytest.raises(PrepareError, match="pixels of the resized picture"):
        run("coco", path, notation="qwen2.5-vl")
    with pytest.raises(PrepareError, match="not a COCO file"):
        run("coco", path)
