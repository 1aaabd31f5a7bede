"""Shards: what is written can be read by others and by offset, and nothing malformed goes in or comes out."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from megavlm.data.shards import ShardError, ShardReader, ShardWriter, content_hash, parse_sample, scan_shard, shard_paths
from megavlm.data.storage import list_files
from tests.unit.data.s3_server import s3_server

__all__ = ["s3_server"]

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
    assert sample == {**ONE, "images": [{"file": "k0.0.png", "width": 24, "height": 16, "sha256": hashlib.sha256(picture).hexdigest()}]}


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


def _pax_shard(path, names):
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 3, 1.5  # a fractional time makes a PAX record, as webdataset's writer does
            tar.addfile(info, io.BytesIO(b"abc"))


@pytest.mark.parametrize("long", [False, True])
def test_every_kind_of_header_is_read_as_tarfile_reads_it(tmp_path, long):
    path = tmp_path / "shard-00000.tar"
    names = [f"{'deep/' * 30 if long else ''}k{i}.{e}" for i in range(5) for e in ("json", "0.png")]
    for fmt in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=fmt) as tar:
            for i, name in enumerate(names):
                info = tarfile.TarInfo(name)
                info.size, info.mtime = 700 * i, i
                tar.addfile(info, io.BytesIO(bytes(700 * i)))
        with tarfile.open(path) as tar:
            expected = [(m.name, m.offset_data, m.size) for m in tar]
        found = [m for raw in scan_shard(path) for m in (raw.json, *raw.files.values())]
        assert [(m.name, m.offset, m.size_bytes) for m in found] == expected
    _pax_shard(path, names)
    assert [raw.text for raw in scan_shard(path, with_json=True)] == [b"abc"] * 5


@pytest.mark.parametrize("pax", [False, True])
def test_a_shard_cut_anywhere_is_told(tmp_path, png, pax):
    path = tmp_path / "shard-00000.tar"
    if pax:
        _pax_shard(path, [f"k{i}.json" for i in range(4)])
    else:
        with ShardWriter(tmp_path) as writer:
            for i in range(4):
                writer.write(f"k{i}", ONE, [png(8, 8)])
    whole = path.read_bytes()
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    for at in [*range(0, end, 512), 100, 700]:
        path.write_bytes(whole[:at])
        with pytest.raises(ShardError, match="not a whole tar file"):
            list(scan_shard(path))
    path.write_bytes(whole[:2048] + b"x" * 512 + whole[2560:])
    if not pax:
        with pytest.raises(ShardError, match="wrong checksum|no end mark"):
            list(scan_shard(path))


def test_video_times_are_kept_and_hashes_are_of_the_pictures(tmp_path, png):
    frames = [png(8, 8, seed=i) for i in range(2)]
    talk = [{"role": "user", "content": "<image><image>What?"}, {"role": "assistant", "content": "x"}]
    given = [{"file": f"v.{i}.png", "width": 8, "height": 8, "time_s": i / 2} for i in range(2)]
    with ShardWriter(tmp_path) as writer:
        writer.write("v", {**ONE, "messages": talk, "images": given}, frames)
    (raw,) = scan_shard(shard_paths(tmp_path)[0], with_json=True)
    images = parse_sample(raw.text, "v").images
    assert [i.time_s for i in images] == [0.0, 0.5]
    assert [i.sha256 for i in images] == [hashlib.sha256(f).hexdigest() for f in frames]


def test_content_hash_is_of_content_alone():
    base = {"task": "t", "split": "s", "messages": TALK, "images": [{"file": "a.0.png", "width": 8, "height": 8, "sha256": "0" * 64}]}

    def of(size=5, **change):
        return content_hash(parse_sample(json.dumps({**base, **change}), "x"), [size])

    assert of() == of(size=6) == of(task="u", split="v", weight=2.0, scores={"a": 1.0}, source="z", meta={"b": 1})
    assert of()[1] is True
    other = [
        of(messages=[TALK[0], {"role": "assistant", "content": "43"}]),
        of(images=[{**base["images"][0], "sha256": "1" * 64}]),
        of(images=[{**base["images"][0], "sha256": ""}]),
        of(size=6, images=[{**base["images"][0], "sha256": ""}]),
        of(objects=[{"image": 0, "label": 1, "box_px": [0, 0, 8, 8]}]),
    ]
    assert len({of()[0], *(h for h, _ in other)}) == 6
    assert [whole for _, whole in other] == [True, True, False, False, True]


@pytest.mark.parametrize("url", ["memory://shards-test", "s3://data/shards"])
def test_shards_in_an_object_store(url, s3_server, png):
    folder = f"{url}/{uuid.uuid4().hex}"
    with ShardWriter(folder, samples_per_shard=2) as writer:
        for i in range(3):
            writer.write(f"k{i}", ONE, [png(24, 16, seed=i)])
    paths = shard_paths(folder)
    assert [p.name for p in paths] == ["shard-00000.tar", "shard-00001.tar"]
    raws = list(scan_shard(paths[0], with_json=True))
    assert [r.key for r in raws] == ["k0", "k1"]
    reader = ShardReader(folder, [p.name for p in paths])
    picture = raws[1].files["k1.0.png"]
    assert reader.read(0, picture.offset, picture.size_bytes) == png(24, 16, seed=1)
    assert reader.read_many(0, [(r.json.offset, r.json.size_bytes) for r in raws]) == [r.text for r in raws]
    with pytest.raises(ShardError, match="ends before byte"):
        reader.read(1, picture.offset, 1 << 20)
    with pytest.raises(ShardError, match="already holds 2 shards"):
        ShardWriter(folder)
    with pytest.raises(ShardError, match="cannot read shard"):
        ShardReader(folder, ["shard-00009.tar"]).read(0, 0, 1)
    with pytest.raises(RuntimeError), ShardWriter(f"{folder}/b", samples_per_shard=1) as writer:
        writer.write("a", ONE, [png(8, 8)])
        writer.write("b", ONE, [png(8, 8)])
        raise RuntimeError
    assert list_files(f"{folder}/b", "*") == []
