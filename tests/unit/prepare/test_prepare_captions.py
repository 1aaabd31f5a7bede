"""Caption folders and manifests, and WebDataset tars."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

from megavlm.data.prepare import PrepareError


def test_folder_with_texts_beside(tmp_path, run, make_digit):
    folder = tmp_path / "caps"
    (folder / "deep" / "er").mkdir(parents=True)
    for i, place in enumerate(("a.PNG", "deep/b.v2.webp", "deep/er/c.jpg")):
        kind = {"PNG": "PNG", "webp": "WEBP", "jpg": "JPEG"}[place.rpartition(".")[2]]
        (folder / place).write_bytes(make_digit(i, kind))
        (folder / (place.rpartition(".")[0] + ".txt")).write_text(f" caption {i}\n")
    (folder / "d.png").write_bytes(make_digit(5))
    (folder / "e.png").write_bytes(make_digit(5))
    (folder / "e.txt").write_text(" \n")
    (folder / "f.png").write_bytes(make_digit(5))
    (folder / "f.txt").write_bytes(b"\xff\xfe\xff")
    done = run("captions", folder, prompt="Describe it.")
    assert done.texts == [["<image>\nDescribe it.", f"caption {i}"] for i in range(3)]
    assert [s["images"][0]["file"].rpartition(".")[2] for s in done.samples] == ["png", "webp", "jpg"]
    assert done.refused == {"no caption": 1, "empty caption": 1, "caption that is not UTF-8": 1}
    assert [s["meta"]["id"] for s in done.samples] == ["a.PNG", "deep/b.v2.webp", "deep/er/c.jpg"]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json", "parquet"])
def test_manifest_with_columns(kind, tmp_path, pictures, run):
    rows = [{"url": f"pictures/{i}.png", "alt": f'a "digit",\nnumber {i}', "sim": 0.25 * i} for i in range(4)]
    path = tmp_path / f"m.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif kind in ("csv", "tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)))
    done = run("captions", path, columns=(("caption", "alt"), ("image", "url"), ("score.clip", "sim")))
    assert done.refused == {}
    assert done.texts == [["<image>", r["alt"]] for r in rows]
    assert [s["scores"]["clip"] for s in done.samples] == [r["sim"] for r in rows]


def test_manifest_that_lacks_a_column_is_named(tmp_path, run):
    (tmp_path / "m.csv").write_text("url,text\na.png,b\n")
    with pytest.raises(PrepareError, match=r"no column 'image', 'caption' \(it has: url, text\).*--columns"):
        run("captions", tmp_path / "m.csv")


def test_manifest_rows_that_do_not_fit(tmp_path, pictures, run):
    (tmp_path / "m.csv").write_text(
        "image,caption,s\npictures/1.png,ok,1\npictures/1.png,a,b,c\npictures/1.png,x,high\npictures/1.png,,2\n"
    )
    done = run("captions", tmp_path / "m.csv", columns=(("score.s", "s"),))
    assert done.refused == {"row with another number of cells": 1, "score that is no number": 1, "empty caption": 1}


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_tars_written_by_the_webdataset_package(tmp_path, run, make_digit):
    folder = tmp_path / "wds"
    folder.mkdir()
    with webdataset.ShardWriter(f"{folder}/%03d.tar", maxcount=3, verbose=0) as writer:
        for i in range(7):
            fields = {"caption": f"json {i}", "similarity": i / 10}
            more = {"txt": f"text {i}"} if i % 2 else {}
            writer.write({"__key__": f"part/{i:05d}", "jpg": make_digit(i, "JPEG"), "json": fields, **more})
    done = run("webdataset", folder, columns=(("score.clip", "similarity"),))
    assert done.refused == {}
    assert [t[1] for t in done.texts] == [f"text {i}" if i % 2 else f"json {i}" for i in range(7)]
    assert [s["scores"]["clip"] for s in done.samples] == [i / 10 for i in range(7)]
    assert [s["pictures"] for s in done.samples] == [[make_digit(i, "JPEG")] for i in range(7)]
    assert done.samples[3]["meta"] == {"id": "part/00003"}


def test_tars_with_faults(tmp_path, run, make_digit):
    picture = make_digit(1)
    tar_of(
        tmp_path / "a.tar",
        [
            *[("1.png", picture), ("1.txt", b"fine"), ("1.npy", b"xx")],
            ("2.png", picture),
            ("3.txt", b"alone"),
            *[("4.png", picture), ("4.json", b"{broken")],
            *[("5.png", b"no"), ("5.txt", b"text")],
            *[("6.png", picture), ("6.json", json.dumps({"messages": [{"role": "user", "content": "<image>?"}]}).encode())],
        ],
    )
    done = run("webdataset", tmp_path / "a.tar")
    assert done.refused == {"no caption": 1, "no picture": 1, "broken .json": 1, "unreadable picture": 1, "no answer": 1}
    assert done.texts == [["<image>", "fine"]]
    assert done.report.tally.notes == Counter({"members left out: .npy": 1})


def test_cut_tar_loses_its_end_only_and_says_so(tmp_path, run, make_digit):
    whole = tmp_path / "whole.tar"
    tar_of(whole, [(f"{i}.{e}", make_digit(i) if e == "png" else b"text") for i in range(5) for e in ("png", "txt")])
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: -(10240 + 2000)])
    done = run("webdataset", tmp_path / "cut.tar")
    assert done.refused == {"tar file that ends too early": 1}
    assert 1 <= len(done.samples) < 5


def test_own_shards_again(tmp_path, pictures, run, lines):
    """Everything but keys survives a second pass: order of pictures, task, split, weight, meta."""
    turns = [{"from": "human", "value": "<image> or <image>?"}, {"from": "gpt", "value": "both"}]
    records = [{"id": i, "images": [f"{i}.png", f"{i + 1}.png"], "conversations": turns} for i in range(4)]
    first = run("llava", lines(*records), images=str(pictures), task="compare", held_out_fraction=0.5)
    again = run("webdataset", first.folder)

    def told(sample):
        return {k: v for k, v in sample.items() if k not in ("key", "source", "images")}

    assert [told(s) for s in again.samples] == [told(s) for s in first.samples]


def test_not_a_tar(tmp_path, run):
    (tmp_path / "a.tar").write_bytes(b"hello" * 500)
    with pytest.raises(PrepareError, match=r"a.tar: not an uncompressed tar file"):
        run("webdataset", tmp_path / "a.tar")
