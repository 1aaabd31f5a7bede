"""LLaVA's JSON, ShareGPT and OpenAI messages: what is written, and what is refused for which reason."""

from __future__ import annotations

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

TURNS = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "It is 3."}]


def test_llava_array_keeps_bytes_texts_and_ids(tmp_path, pictures, run):
    path = tmp_path / "llava.json"
    two = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image><image> Same?"}, {"from": "gpt", "value": "No"}]
    entries = [
        {"id": "a/1", "image": "3.png", "conversations": TURNS},
        {"id": 2, "images": ["0.png", "6.jpg"], "conversations": two},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello — ≤ 你好"}]},
    ]
    path.write_text(json.dumps(entries, indent=2, ensure_ascii=False), encoding="utf-8-sig")
    done = run("llava", path, images=str(pictures))
    assert done.refused == {}
    assert done.texts == [["<image>\nWhich digit?", "It is 3."], ["Be brief.", "<image><image> Same?", "No"], ["Hi", "Hello — ≤ 你好"]]
    assert [m["role"] for m in done.samples[1]["messages"]] == ["system", "user", "assistant"]
    assert done.samples[0]["pictures"] == [(pictures / "3.png").read_bytes()]
    assert done.samples[1]["pictures"] == [(pictures / "0.png").read_bytes(), (pictures / "6.jpg").read_bytes()]
    assert [s.get("meta") for s in done.samples] == [{"id": "a/1"}, {"id": 2}, None]
    assert {(s["task"], s["split"], s["source"]) for s in done.samples} == {("conversation", "train", "llava")}


def test_llava_parquet_with_pictures_inside(tmp_path, run, make_digit):
    """As the Hugging Face hub stores LLaVA-OneVision: a struct of bytes, over several row groups."""
    rows = [{"id": str(i), "image": {"bytes": make_digit(i), "path": None}, "conversations": TURNS} for i in range(7)]
    path = tmp_path / "part.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    done = run("llava", path, samples_per_shard=2)
    assert [s["pictures"] for s in done.samples] == [[make_digit(i)] for i in range(7)]
    assert len(done.report.shards) == 4


REFUSALS = {
    "missing picture": {"image": "none.png", "conversations": TURNS},
    "picture on the web": {"image": "https://example.com/a.png", "conversations": TURNS},
    "picture without address": {"image": 7, "conversations": TURNS},
    "unreadable picture": {"image": "broken.png", "conversations": TURNS},
    'wrong number of "<image>"': {"image": "1.png", "conversations": [{"from": "human", "value": "Which?"}, TURNS[1]]},
    "unknown role": {"image": "1.png", "conversations": [{"from": "alien", "value": "<image>"}, TURNS[1]]},
    "empty answer": {"image": "1.png", "conversations": [TURNS[0], {"from": "gpt", "value": "  \n"}]},
    "no answer": {"image": "1.png", "conversations": TURNS[:1]},
    "no question": {"conversations": [{"from": "gpt", "value": "Hello"}]},
    "picture in an answer": {"image": "1.png", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "<image>"}]},
    "system turn in the middle": {"image": "1.png", "conversations": [*TURNS, {"from": "system", "value": "x"}]},
    "no conversation": {"image": "1.png"},
    "turn without text": {"conversations": [{"from": "human", "value": None}, TURNS[1]]},
    "turn that is no object": {"conversations": ["hi", "ho"]},
    "sample with video": {"video": "a.mp4", "conversations": TURNS},
    "record that is no object": [1, 2],
    "text that is not Unicode": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "\ud83d"}]},
}


def test_llava_refuses_each_fault_by_name_and_keeps_the_rest(tmp_path, pictures, run, lines):
    (pictures / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
    good = {"image": "1.png", "conversations": TURNS}
    path = lines(*[r for bad in REFUSALS.values() for r in (good, bad)])
    with path.open("a") as file:
        file.write("{broken\n\n")
    done = run("llava", path, images=str(pictures))
    assert done.refused == {**dict.fromkeys(REFUSALS, 1), "line that is not JSON": 1}
    assert len(done.samples) == len(REFUSALS) == done.report.tally.written
    assert done.report.tally.read == 2 * len(REFUSALS) + 1
    examples = [e for r in done.report.tally.refused.values() for e in r.examples]
    assert all(e.startswith(f"{path}: line ") for e in examples)
    saved = json.loads((done.folder / "prepare-report.json").read_text())
    assert saved["refused"]["missing picture"]["count"] == 1 and "none.png" in saved["refused"]["missing picture"]["examples"][0]


def test_report_keeps_the_first_examples_in_order(pictures, run, lines):
    bad = [{"image": f"none-{i}.png", "conversations": TURNS} for i in range(20)]
    done = run("llava", lines({"image": "1.png", "conversations": TURNS}, *bad), images=str(pictures), samples_per_shard=3)
    refused = done.report.tally.refused["missing picture"]
    assert refused.count == 20
    assert [e.rpartition("none-")[2].split(".")[0] for e in refused.examples] == ["0", "1", "2", "3", "4"]


def test_messages_with_parts(pictures, run, lines):
    uri = "data:image/png;base64," + base64.b64encode((pictures / "2.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": "and"},
        {"type": "image", "image": "3.png"},
        {"type": "image_url", "image_url": f"file://{pictures}/6.jpg"},
        {"type": "input_text", "text": "Which?"},
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "2, 3, 6"}]}
    done = run("messages", lines({"id": "m", "messages": [{"role": "user", "content": parts}, answer]}), images=str(pictures))
    assert done.texts == [["<image>\nand<image>\n<image>\nWhich?", "2, 3, 6"]]
    assert done.samples[0]["pictures"] == [(pictures / n).read_bytes() for n in ("2.png", "3.png", "6.jpg")]


def test_messages_with_marks_in_the_text(pictures, run, lines):
    """ShareGPT as LLaMA-Factory has it: strings with <image>, pictures in a field."""
    record = {"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "4"}], "images": ["4.png"]}
    shared = {"conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "5"}], "image": "5.png"}
    done = run("messages", lines(record, shared), images=str(pictures))
    assert done.texts == [["<image>?", "4"], ["<image>?", "5"]]


@pytest.mark.parametrize(
    "part, reason",
    [
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@"}}, "broken data: URI"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}, "broken data: URI"),
        ({"type": "image"}, "picture without address"),
        ({"type": "audio", "audio": "a.wav"}, "unknown part"),
        ({"type": "text", "text": "<image>"}, '"<image>" as text'),
        ({"type": "text"}, "turn without text"),
    ],
)
def test_messages_refuse_parts(part, reason, run, lines):
    answer = {"role": "assistant", "content": "yes"}
    good = {"messages": [{"role": "user", "content": "?"}, answer]}
    done = run("messages", lines(good, {"messages": [{"role": "user", "content": [part]}, answer]}))
    assert done.refused == {reason: 1}


def test_columns_rename_fields(pictures, run, lines):
    done = run("llava", lines({"pic": "1.png", "chat": TURNS}), images=str(pictures), columns=(("conversations", "chat"), ("image", "pic")))
    assert done.texts == [["<image>\nWhich digit?", "It is 3."]]
