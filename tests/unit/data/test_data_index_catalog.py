"""The catalog and the token counts: right by other people's readers, made again only where something changed, wherever the shards lie."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import uuid
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from megavlm.data import catalog, storage, token_table
from megavlm.data.catalog import CATALOG_NAME, SCHEMA, build_catalog, load_catalog
from megavlm.data.chat import Chat
from megavlm.data.index import SampleIndexError, build_index
from megavlm.data.sample_index import COLUMN_TYPES, open_index
from megavlm.data.shards import ShardError, ShardWriter
from tests.unit.data.s3_server import s3_server

__all__ = ["s3_server"]


@pytest.fixture
def work(monkeypatch):
    """Counts scanned shards and tokenised conversations."""
    count: Counter[str] = Counter()

    def counted(module, name):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, **k: count.update([name]) or real(*a, **k))

    counted(catalog, "shard_table")
    counted(token_table, "encode_text")
    return count


@pytest.fixture
def build(make_recipe, tokenizer):
    def run(objective="multimodal", data=None, source=None):
        recipe = make_recipe(data=data, source=source)
        return build_index(recipe.data.sources["a"], recipe.data, recipe.model, objective, tokenizer, progress=False)

    return run


def test_rows_are_what_tarfile_json_and_pillow_see(shards):
    build_catalog(shards, progress=False)
    rows = pq.read_table(shards / CATALOG_NAME).to_pylist()
    at = 0
    for path in sorted(shards.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            members = {m.name: m for m in tar}
            for name in [n for n in members if n.endswith(".json")]:
                row, text = rows[at], tar.extractfile(name).read()
                sample = json.loads(text)
                at += 1
                assert (row["key"], row["shard"]) == (name[:-5], path.name)
                assert path.read_bytes()[row["json_offset"] :][: row["json_size"]] == text
                assert (row["task"], row["split"], row["weight"]) == (sample["task"], sample["split"], sample.get("weight", 1.0))
                assert row["num_turns"] == sum(m["role"] == "assistant" for m in sample["messages"])
                assert row["max_label"] == max((o["label"] for o in sample.get("objects", [])), default=-1)
                assert row["hash_covers_bytes"] is True and row["problem"] is None and row["num_frames"] == 0
                pictures = [members[i["file"]] for i in sample.get("images", [])]
                assert row["image_offset"] == [m.offset_data for m in pictures]
                assert row["image_size"] == [m.size for m in pictures]
                sizes = [Image.open(io.BytesIO(tar.extractfile(m).read())).size for m in pictures]
                assert list(zip(row["image_width"], row["image_height"], strict=True)) == sizes
    assert at == len(rows) == 66
    assert len({r["content_hash"] for r in rows}) == 66


def test_no_picture_is_read(shards, build):
    """Pictures replaced by zeros change nothing in the catalog, and are not even looked at."""
    before = build_catalog(shards, progress=False).table
    for path in shards.glob("shard-*.tar"):
        data = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".png"):
                    data[member.offset_data : member.offset_data + member.size] = bytes(member.size)
        path.write_bytes(data)
    assert build_catalog(shards, progress=False).table.equals(before)
    build()


def test_only_changed_shards_are_scanned(shards, work, png):
    first = build_catalog(shards, progress=False)
    assert work["shard_table"] == 4
    assert build_catalog(shards, progress=False).table.equals(first.table)
    assert work["shard_table"] == 4
    os.utime(shards / "shard-00001.tar", ns=(1, 1))
    assert build_catalog(shards, progress=False).table.equals(first.table)
    assert work["shard_table"] == 5
    shutil.copy(shards / "shard-00000.tar", shards / "shard-00002a.tar")
    (shards / "shard-00000.tar").unlink()
    changed = build_catalog(shards, progress=False)
    assert work["shard_table"] == 6
    expected = [*range(20, 60), *range(20), *range(60, 66)]
    assert changed.table["key"].to_pylist() == [f"s{i:03d}" for i in expected]
    assert [changed.shard_names[i] for i in changed.shard_ids()] == changed.table["shard"].to_pylist()
    (shards / CATALOG_NAME).unlink()
    assert build_catalog(shards, progress=False).table.to_pylist() == changed.table.to_pylist()


def test_a_damaged_catalog_is_made_again_and_a_read_only_one_lies_in_the_users_cache(shards, work, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    first = build_catalog(shards, progress=False)
    (shards / CATALOG_NAME).write_bytes((shards / CATALOG_NAME).read_bytes()[:-9])
    assert build_catalog(shards, progress=False).table.equals(first.table)
    assert work["shard_table"] == 8
    (shards / CATALOG_NAME).unlink()
    (shards / CATALOG_NAME).mkdir()
    build_catalog(shards, progress=False)
    assert build_catalog(shards, progress=False).table.equals(first.table)
    assert work["shard_table"] == 12
    assert len(list((tmp_path / "cache/megavlm/index").rglob("*.parquet"))) == 1


def test_processes_give_the_same(shards, tokenizer):
    one = build_catalog(shards, progress=False, num_workers=1)
    (shards / CATALOG_NAME).unlink()
    two = build_catalog(shards, progress=False, num_workers=2)
    assert one.table.to_pylist() == two.table.to_pylist()
    chat, rows = Chat("megavlm", tokenizer), np.arange(66)
    alone = token_table.count_tokens(one, rows, chat, progress=False, num_workers=1)
    shutil.rmtree(shards / ".megavlm-index")
    together = token_table.count_tokens(one, rows, chat, progress=False, num_workers=2)
    for name in ("num_tokens", "num_targets", "ids_hash"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(together, name))


def test_other_pictures_splits_and_shards_tokenise_nothing_again(build, work, shards):
    build()
    assert work["encode_text"] == 60
    build(data={"image": {"policy": "tiles", "max_tiles": 4, "thumbnail": True}, "seq_len_tokens": 400})
    build(data={"image": {"policy": "native"}, "seq_len_tokens": 400})
    build(source={"tasks": ["read"]})
    (shards / "shard-00000.tar").rename(shards / "shard-00007.tar")
    build()
    assert work["encode_text"] == 60
    build(source={"split": "heldout"})
    assert work["encode_text"] == 66
    build(data={"chat_template": "chatml"})
    assert work["encode_text"] == 126


def _one(folder, *answers, png=None):
    shutil.rmtree(folder, ignore_errors=True)
    with ShardWriter(folder) as writer:
        for i, answer in enumerate(answers):
            talk = [{"role": "user", "content": "<image>?" if png else "?"}, {"role": "assistant", "content": answer}]
            writer.write(f"k{i}", {"task": "t", "split": "train", "messages": talk}, [png] if png else [])


def test_another_text_of_equal_length_and_another_picture_of_equal_size_change_the_fingerprint(build, tmp_path, png):
    def of(*answers, png=None):
        _one(tmp_path / "d", *answers, png=png)
        return build(source={"path": str(tmp_path / "d")})

    a, b = of("12"), of("21")
    assert a.length_tokens.tolist() == b.length_tokens.tolist()
    assert a.num_targets.tolist() == b.num_targets.tolist()
    assert (
        len({a.fingerprint, b.fingerprint, of("12", png=png(8, 8, seed=1)).fingerprint, of("12", png=png(8, 8, seed=2)).fingerprint}) == 4
    )
    assert of("12").fingerprint == a.fingerprint


def test_equal_content_is_tokenised_once(build, work, tmp_path):
    _one(tmp_path / "d", *["same"] * 5, "other")
    assert len(build(source={"path": str(tmp_path / "d")})) == 6
    assert work["encode_text"] == 2


def test_conversations_that_cannot_be_used_are_named_every_time(build, tmp_path):
    _one(tmp_path / "d", "fine", "has <|end|> inside", "fine too")
    for _ in range(2):
        with pytest.raises(SampleIndexError, match=r"1 samples .*\n.*'k1': .*<\|end\|>"):
            build(source={"path": str(tmp_path / "d")})


def test_a_process_maps_the_same_file(build, shards):
    index = build()
    packed = pickle.dumps(index)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    for name in ("keys", *COLUMN_TYPES):
        np.testing.assert_array_equal(getattr(again, name), getattr(index, name))
        assert not getattr(again, name).flags.owndata
    assert again.sample(3) == index.sample(3)
    assert again.grids(2) == index.grids(2)
    file = index.file
    index.file = None
    plain = pickle.loads(pickle.dumps(index))
    assert plain.fingerprint == index.fingerprint == open_index(shards, file).fingerprint
    np.testing.assert_array_equal(plain.length_tokens, index.length_tokens)


@pytest.mark.parametrize("url", ["memory://index-test", "s3://data/index"])
def test_an_object_store_gives_the_same_index(url, s3_server, build, shards, work, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    local = build()
    folder = f"{url}/{uuid.uuid4().hex}"
    for path in shards.glob("shard-*.tar"):
        storage.write_bytes(f"{folder}/{path.name}", path.read_bytes())
    work.clear()
    remote = build(source={"path": folder})
    assert remote.fingerprint == local.fingerprint
    assert dict(work) == {"shard_table": 4, "encode_text": 60}
    for row in (0, 1, 2, 59):
        assert remote.sample(row) == local.sample(row)
        assert [remote.image(row, i) for i in range(row % 3)] == [local.image(row, i) for i in range(row % 3)]
    assert storage.exists(f"{folder}/{CATALOG_NAME}")
    build(source={"path": folder})
    build(source={"path": folder}, data={"image": {"policy": "native"}, "seq_len_tokens": 400})
    assert dict(work) == {"shard_table": 4, "encode_text": 60}
    storage.write_bytes(f"{folder}/shard-00003.tar", (shards / "shard-00002.tar").read_bytes())
    build(source={"path": folder})
    assert work["shard_table"] == 5
    with pytest.raises(SampleIndexError, match="has no shard-\\*.tar files \\(there is no such folder\\)"):
        build(source={"path": f"{url}/nothing"})


def test_bad_samples_are_rows_with_their_problem(tmp_path, build):
    folder = tmp_path / "d"
    _one(folder, "fine")
    with tarfile.open(folder / "shard-00001.tar", "w") as tar:
        for name, data in (("a.json", b"{broken"), ("b.json", json.dumps(_with_picture("b.0.png")).encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    found = build_catalog(folder, progress=False)
    assert found.table.schema.equals(SCHEMA)
    problems = found.table["problem"].to_pylist()
    assert problems[0] is None
    assert "sample 'a'" in problems[1] and "has no file b.0.png" in problems[2]
    with pytest.raises(SampleIndexError, match="2 samples .* cannot be used"):
        build(source={"path": str(folder)})
    assert load_catalog(folder, columns=["key", "shard"]).table["key"].to_pylist() == ["k0", "a", "b"]
    (folder / "shard-00001.tar").write_bytes(b"nonsense" * 100)
    with pytest.raises(ShardError, match="not a whole tar file"):
        build(source={"path": str(folder)})


def _with_picture(file):
    talk = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "x"}]
    return {"task": "t", "split": "train", "messages": talk, "images": [{"file": file, "width": 8, "height": 8}]}
