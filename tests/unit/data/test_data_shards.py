"""Shards: what is written can be read by others and by offset, and nothing malformed goes in or comes out."""

from __future__ import annotations

import json
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from megavlm.data.shards import ShardError, ShardReader, ShardWriter, parse_sample, scan_shard, shard_paths

TALK = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "42"}]
ONE = {"task": "read", "split": "train", "messages": TALK}


def test_written_shards_are_plain_webdataset_tars(tmp_path, png):
    picture = png(24, 16)
    with ShardWriter(tmp_path, samples_per_shard=2) as writer:
        for i in range(3):
            writer.write(f"k{i}", ONE, [picture])
    assert [p.name for p in shard_paths(tmp_path)] == ["shard-00000.tar", "shard-00001.tar"]
    with tarfile.open(tmp_path / "shard-00000.tar") as tar:
        assert tar.getnames() == ["k0.json", "k0.0.png", "k1.json", "k1.0.png"]
        assert tar.extractfile("k0.0.png").read() == picture
        sample = json.loads(tar.extractfile("k0.json").read())
    assert sample == {**ONE, "images": [{"file": "k0.0.png", "width": 24, "height": 16}]}


def test_size_is_that_of_the_upright_picture(tmp_path, png):
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    with ShardWriter(tmp_path) as writer:
        writer.write("k", ONE, [png(24, 16, fmt="JPEG", exif=exif)])
    raw = next(scan_shard(shard_paths(tmp_path)[0]))
    data = ShardReader(tmp_path, ["shard-00000.tar"]).read(0, raw.json.offset, raw.json.size_bytes)
    image = parse_sample(data, "k").images[0]
    assert (image.file, image.width, image.height) == ("k.0.jpg", 16, 24)


def test_same_samples_give_the_same_bytes(tmp_path, png):
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name) as writer:
            writer.write("k", ONE, [png(8, 8)])
    assert (tmp_path / "a/shard-00000.tar").read_bytes() == (tmp_path / "b/shard-00000.tar").read_bytes()


def test_an_error_inside_the_block_leaves_nothing(tmp_path, png):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, samples_per_shard=1) as writer:
        writer.write("a", ONE, [png(8, 8)])
        writer.write("b", ONE, [png(8, 8)])
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_shards_is_refused(tmp_path, png):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", ONE, [png(8, 8)])
    with pytest.raises(ShardError, match="already holds 1 shards"):
        ShardWriter(tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "num_images", "message"),
    [
        ("a.b", {}, 1, "a key takes letters"),
        ("a", {}, 2, '1 "<image>" but images has 2'),
        ("a", {"messages": [{"role": "robot", "content": "x"}]}, 0, "messages.0.role"),
        ("a", {"wieght": 2}, 1, "wieght"),
        ("a", {"weight": -1}, 1, "weight"),
        ("a", {"objects": [{"image": 0, "label": 1, "box_px": [0, 0, 9, 8]}]}, 1, "outside its 8x8 image"),
        ("a", {"objects": [{"image": 1, "label": 1, "box_px": [0, 0, 8, 8]}]}, 1, "the sample has 1 images"),
        ("a", {"images": [{"file": "a.0.png", "width": 9, "height": 8}]}, 1, "the pictures say"),
    ],
)
def test_malformed_samples_are_refused_by_name(tmp_path, png, key, change, num_images, message):
    with pytest.raises(ShardError, match=message) as error, ShardWriter(tmp_path) as writer:
        writer.write(key, {**ONE, **change}, [png(8, 8)] * num_images)
    assert repr(key) in str(error.value)


def test_a_key_twice_and_a_broken_picture_are_refused(tmp_path, png):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", ONE, [png(8, 8)])
        with pytest.raises(ShardError, match="already written"):
            writer.write("a", ONE, [png(8, 8)])
        with pytest.raises(ShardError, match="image 0 cannot be read"):
            writer.write("b", ONE, [b"not a picture"])


def test_many_threads_read_right_bytes_with_few_files_open(tmp_path, png, monkeypatch):
    monkeypatch.setattr("megavlm.data.shards._MAX_OPEN_SHARDS", 2)
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for i in range(6):
            writer.write(f"k{i}", ONE, [png(8 + i, 8, seed=i)])
    paths = shard_paths(tmp_path)
    reader = ShardReader(tmp_path, [p.name for p in paths])
    members = [next(iter(next(scan_shard(p)).files.values())) for p in paths]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda i: (i % 6, reader.read(i % 6, members[i % 6].offset, members[i % 6].size_bytes)), range(600)))
    assert all(data == png(8 + i, 8, seed=i) for i, data in got)
    assert len(reader._open) <= 2


def test_cut_shard_is_an_error(tmp_path, png):
    with ShardWriter(tmp_path) as writer:
        writer.write("k", ONE, [png(64, 64)])
    path = shard_paths(tmp_path)[0]
    member = next(iter(next(scan_shard(path)).files.values()))
    path.write_bytes(path.read_bytes()[: member.offset + 100])
    with pytest.raises(ShardError, match="ends before byte"):
        ShardReader(tmp_path, [path.name]).read(0, member.offset, member.size_bytes)
    with pytest.raises(ShardError, match="not a whole tar"):
        list(scan_shard(path))


def test_files_of_a_sample_must_be_together(tmp_path):
    path = tmp_path / "shard-00000.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.json", "b.json", "a.0.png"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(ShardError, match="not together"):
        list(scan_shard(path))
