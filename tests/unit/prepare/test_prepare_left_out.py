"""Nothing vanishes: files, members and annotations that make no sample are refused or noted, by name and number."""

from __future__ import annotations

import io
import json
import tarfile

import pytest

from megavlm.data.prepare import PrepareError
from megavlm.data.shards import ShardError, ShardWriter


def test_captions_folder_tells_of_every_file(tmp_path, run, make_digit):
    folder = tmp_path / "caps"
    folder.mkdir()
    for i, (name, kind) in enumerate((("a.jp2", "JPEG2000"), ("b.ppm", "PPM"), ("c.jfif", "JPEG"), ("d.jpe", "JPEG"))):
        (folder / name).write_bytes(make_digit(i, kind))
    for name in ("e.heic", "f.svg", "clip.mp4", "clip2.mp4", "notes.md", "README"):
        (folder / name).write_bytes(b"x")
    for name in ("a", "b", "c", "d", "e", "f", "orphan", "clip"):
        (folder / f"{name}.txt").write_text(f"caption {name}")
    done = run("captions", folder)
    assert [t[1] for t in done.texts] == [f"caption {n}" for n in "abcd"]
    assert done.refused == {"picture of a format that is not read": 2}
    tally = done.report.tally
    assert (tally.read, tally.num_refused) == (6, 2)
    assert dict(tally.notes) == {
        "captions left out, without a picture beside them": 2,
        "files left out, of no known picture format: .mp4": 2,
        "files left out, of no known picture format: .md": 1,
        "files left out, without a suffix": 1,
    }
    assert tally.note_examples["captions left out, without a picture beside them"] == ["clip.txt", "orphan.txt"]
    saved = json.loads((done.folder / "prepare-report.json").read_text())
    assert saved["note_examples"]["files left out, of no known picture format: .mp4"] == ["clip.mp4", "clip2.mp4"]


def test_tar_members_that_are_no_samples(tmp_path, run, make_digit):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:

        def add(name, data=b"", kind=tarfile.REGTYPE):
            info = tarfile.TarInfo(name)
            info.size, info.type = len(data), kind
            tar.addfile(info, io.BytesIO(data))

        add("folder", kind=tarfile.DIRTYPE)
        for key in ("1", "2", "3"):
            add(f"{key}.png", make_digit(int(key)))
            if key == "2":
                add("2.PNG", make_digit(7))
            if key == "3":
                add("3.1.heic", b"x")
            add(f"{key}.txt", b"caption")
        add("._4.png", b"x")
        add("5.png", kind=tarfile.SYMTYPE)
    done = run("webdataset", tmp_path / "x.tar")
    assert len(done.samples) == 1
    assert done.refused == {"two members of one name": 1, "picture of a format that is not read": 1}
    assert dict(done.report.tally.notes) == {"members left out: hidden files": 1, "members left out: links, pipes and devices": 1}
    assert done.report.tally.note_examples["members left out: links, pipes and devices"] == ["5.png"]


def test_own_shards_keep_objects_and_source(tmp_path, run, make_digit):
    box = [{"image": 0, "label": 1, "box_px": [0.0, 0.0, 5.0, 5.0]}]
    more = {"split": "val", "source": "scan A", "weight": 0.5, "scores": {"clip": 0.25}, "meta": {"id": "x"}}
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    given = [{"task": "t", "messages": turns, "objects": box, **more}, {"task": "boxes", "objects": box, **more}]
    with ShardWriter(tmp_path / "own") as writer:
        for i, sample in enumerate(given):
            writer.write(f"k{i}", sample, [make_digit(i)])
    done = run("webdataset", tmp_path / "own")
    assert done.refused == {}
    assert [{k: s[k] for k in g} for s, g in zip(done.samples, given, strict=True)] == given
    assert [s["source"] for s in run("webdataset", tmp_path / "own", source="mine").samples] == ["mine", "mine"]


@pytest.mark.parametrize("extension", ["/../../x", "a.b", "", "pn g", "../x"])
def test_writer_refuses_extensions_that_are_none(extension, tmp_path, make_digit):
    writer = ShardWriter(tmp_path / "own")
    with pytest.raises(ShardError, match="extension"):
        writer.write("k", {"task": "t", "split": "train"}, [make_digit(1)], extensions=[extension])
    writer.write("k", {"task": "t", "split": "train"}, [make_digit(1)], extensions=[".PNG"])


CATEGORIES = [{"id": 7, "name": "cat"}]


def coco(path, images, annotations, categories=CATEGORIES):
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


def image(number, file=None):
    file = number if file is None else file
    return {"id": number, "file_name": f"{file}.png", "width": 24 + file, "height": 16}


def box(number, numbers):
    return {"image_id": number, "category_id": 7, "bbox": numbers}


def test_coco_box_without_area_loses_the_box_alone(tmp_path, pictures, run):
    boxes = [box(0, [1, 1, 5, 5]), box(0, [1, 1, 0, 5]), box(0, [0, 0, 0, 0]), box(1, [0, 0, 0, 4])]
    done = run("coco", coco(tmp_path / "i.json", [image(0), image(1)], boxes), images=str(pictures))
    assert [s["task"] for s in done.samples] == ["grounding", "referring"]
    assert dict(done.report.tally.notes) == {"boxes left out (of no area)": 2}
    assert done.refused == {"picture without annotations": 1}


def test_coco_rows_that_are_none(tmp_path, pictures, run):
    images = [image(0), 1, {**image(1), "id": [1]}, image(0), image(2), image(2, 3)]
    annotations = [
        *(box(0, [1, 1, 5, 5]), box(2, [1, 1, 5, 5]), 3, {"image_id": [0], "bbox": [0, 0, 1, 1]}),
        *({"image_id": 0, "category_id": 7, "segmentation": [[0, 0, 1, 1]]}, {"image_id": 0}),
    ]
    done = run("coco", coco(tmp_path / "i.json", images, annotations, [*CATEGORIES, "x"]), images=str(pictures))
    assert [s["task"] for s in done.samples] == ["grounding", "referring"]
    assert done.refused == {"entry that is no object": 3, "entry without id": 2, "two pictures with one id": 1}
    assert dict(done.report.tally.notes) == {
        "annotations left out, with neither caption nor bbox": 2,
        "images listed twice, in the same words": 1,
    }
    assert done.report.tally.note_examples["images listed twice, in the same words"] == [f"images[3]: id {0!r}"]


@pytest.mark.parametrize("numbers", [["a", "b", "c", "d"], [float("nan"), 0, 1, 1], [10**400, 0, 1, 1], [None] * 4])
def test_coco_boxes_that_are_no_numbers(numbers, tmp_path, pictures, run):
    path = coco(tmp_path / "i.json", [image(0), image(1)], [box(0, numbers), box(1, [1, 1, 5, 5])])
    assert run("coco", path, images=str(pictures)).refused == {"broken annotation": 1}


def test_coco_caption_with_a_box(tmp_path, pictures, run):
    done = run("coco", coco(tmp_path / "i.json", [image(0)], [{**box(0, [1, 1, 5, 5]), "caption": "hello"}]), images=str(pictures))
    assert done.texts == [["<image>", "hello"]]
    assert dict(done.report.tally.notes) == {"boxes left out, of annotations that hold a caption too": 1}


def test_coco_that_is_no_coco(tmp_path, run):
    (tmp_path / "i.json").write_text('{"images": {"a": 1}, "annotations": []}')
    with pytest.raises(PrepareError, match="images is not a list"):
        run("coco", tmp_path / "i.json")


def test_vqa_annotations_that_are_none(tmp_path, pictures, run):
    questions = [{"question_id": i, "image_id": i, "question": "What?"} for i in (1, 2, 3)] + [{"question_id": [4], "image_id": 1}]
    answers = [{"question_id": 1, "answers": None}, {"question_id": 2, "answers": ["yes"]}, 7, {"question_id": [3], "answers": ["no"]}]
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": answers}))
    more = {"annotations": str(tmp_path / "a.json"), "images": str(pictures), "image_pattern": "{image_id}.png"}
    done = run("vqa", tmp_path / "q.json", **more)
    assert done.texts == [["<image>\nWhat?", "yes"]]
    assert done.refused == {"no answer": 1, "question without annotation": 2}
