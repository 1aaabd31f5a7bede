"""OBELICS and MMC4 documents."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

OBELICS = {
    "texts": ["Intro.", None, "First.", "Second.", None, None, "Third.", None],
    "images": [None, "0.png", None, None, "1.png", "6.jpg", None, "2.png"],
}
TURNS = [
    ("user", "Intro.\n\n<image>"),
    ("assistant", "First.\n\nSecond."),
    ("user", "<image><image>"),
    ("assistant", "Third."),
]


def turns(sample):
    return [(m["role"], m["content"]) for m in sample["messages"]]


def test_obelics_keeps_the_order_of_texts_and_pictures(pictures, run, lines):
    done = run("interleaved", lines(OBELICS), images=str(pictures))
    assert turns(done.samples[0]) == TURNS
    assert done.samples[0]["pictures"] == [(pictures / n).read_bytes() for n in ("0.png", "1.png", "6.jpg")]
    assert dict(done.report.tally.notes) == {"pictures left out of documents: no text behind them": 1}
    assert done.samples[0]["task"] == "interleaved"


def test_obelics_parquet_with_pictures_inside(tmp_path, run, make_digit):
    row = {"texts": ["a", None, "b"], "images": [None, {"bytes": make_digit(3), "path": None}, None]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "o.parquet")
    done = run("interleaved", tmp_path / "o.parquet")
    assert turns(done.samples[0]) == [("user", "a\n\n<image>"), ("assistant", "b")]
    assert done.samples[0]["pictures"] == [make_digit(3)]


def test_mmc4_puts_pictures_before_their_sentence(pictures, run, lines):
    document = {
        "text_list": ["A.", "B.", "C.", "D."],
        "image_info": [
            {"image_name": "2.png", "matched_text_index": 3, "raw_url": "http://x/2.png"},
            {"image_name": "0.png", "matched_text_index": 1, "raw_url": "http://x/0.png"},
        ],
    }
    done = run("interleaved", lines(document), images=str(pictures))
    assert turns(done.samples[0]) == [("user", "A. <image>"), ("assistant", "B. C."), ("user", "<image>"), ("assistant", "D.")]
    assert done.samples[0]["pictures"] == [(pictures / n).read_bytes() for n in ("0.png", "2.png")]


def test_documents_that_do_not_fit(pictures, run, lines):
    bad = {
        "lists of unequal length": {"texts": ["a"], "images": []},
        "text and picture in one place": {"texts": ["a"], "images": ["0.png"]},
        "document without pictures": {"texts": ["a", None], "images": [None, "0.png"]},
        "no document": {"texts": "a", "images": []},
        "picture matched to no text": {"text_list": ["a"], "image_info": [{"image_name": "0.png", "matched_text_index": 1}]},
        '"<image>" as text': {"texts": [None, "say <image>"], "images": ["0.png", None]},
        "missing picture": {"texts": [None, "b"], "images": ["gone.png", None]},
    }
    done = run("interleaved", lines(OBELICS, *bad.values()), images=str(pictures))
    assert done.refused == dict.fromkeys(bad, 1)


def test_missing_pictures_left_out_are_counted(pictures, run, lines):
    document = {"texts": [None, "b", None, "d"], "images": ["gone.png", None, "1.png", None]}
    done = run("interleaved", lines(document), images=str(pictures), missing_pictures="leave-out")
    assert turns(done.samples[0]) == [("user", "b\n\n<image>"), ("assistant", "d")]
    assert dict(done.report.tally.notes) == {"pictures left out of documents: missing picture": 1}
