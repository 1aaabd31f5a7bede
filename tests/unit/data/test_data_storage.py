"""Storage: the same answers from a disk, from fsspec's memory and from a real S3 server, and errors that say what to do."""

from __future__ import annotations

import builtins
import sys
import uuid

import pytest

from megavlm.data import storage
from megavlm.data.storage import StorageError, Url
from tests.unit.data.s3_server import s3_server

__all__ = ["s3_server"]


@pytest.fixture(params=["disk", "file", "memory", "s3"])
def folder(request, tmp_path):
    if request.param == "s3":
        request.getfixturevalue("s3_server")
    unique = uuid.uuid4().hex[:8]
    return {"disk": str(tmp_path), "file": f"file://{tmp_path}", "memory": f"memory://{unique}", "s3": f"s3://data/{unique}/deep"}[
        request.param
    ]


def test_what_is_written_is_read_whole_and_in_ranges(folder):
    data = bytes(range(256)) * 40
    path = storage.as_path(folder) / "a.bin"
    assert not storage.exists(path)
    storage.write_bytes(path, data)
    assert storage.exists(path)
    assert storage.read_bytes(path) == data
    assert storage.read_range(path, 300, 17) == data[300:317]
    assert storage.read_range(path, len(data) - 3, 10) == data[-3:]
    assert storage.read_range(path, len(data) + 3, 10) == b""
    ranges = [(5, 10), (9000, 100), (17, 0), (4000, 1)]
    assert storage.read_ranges(path, ranges) == [data[o : o + s] for o, s in ranges]
    with storage.open_read(path) as file:
        file.seek(1000)
        assert file.read(5) == data[1000:1005]
    assert storage.stamp(path).size_bytes == len(data)


def test_a_changed_file_has_another_stamp(folder):
    path = storage.as_path(folder) / "a.bin"
    storage.write_bytes(path, b"one")
    before = storage.stamp(path)
    storage.write_bytes(path, b"two")
    assert before.size_bytes == storage.stamp(path).size_bytes
    assert before.stamp != storage.stamp(path).stamp
    storage.rename(path, path.parent / "b.bin")
    assert not storage.exists(path)
    assert storage.read_bytes(path.parent / "b.bin") == b"two"
    storage.remove(path)


def test_a_folder_is_listed_by_pattern_and_name(folder):
    root = storage.as_path(folder)
    assert storage.list_files(root / "none", "*") == []
    for name in ("shard-00001.tar", "shard-00000.tar", "shard-00000.tar.partial", "other.tar"):
        storage.write_bytes(root / name, b"x")
    storage.write_bytes(root / "below" / "shard-00002.tar", b"x")
    assert [p.name for p in storage.list_files(folder, "shard-*.tar")] == ["shard-00000.tar", "shard-00001.tar"]
    assert storage.read_bytes(storage.list_files(folder, "other*")[0]) == b"x"


def test_a_failed_write_leaves_the_old_file_and_nothing_else(folder):
    path = storage.as_path(folder) / "a.bin"
    storage.write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="stop"), storage.open_write(path) as file:
        file.write(b"new" * 10)
        raise RuntimeError("stop")
    assert storage.read_bytes(path) == b"old"
    assert [p.name for p in storage.list_files(folder, "*")] == ["a.bin"]


@pytest.mark.parametrize("read", [storage.read_bytes, storage.stamp, lambda p: storage.read_range(p, 0, 4), storage.open_read])
def test_a_missing_file_is_named(folder, read):
    path = storage.as_path(folder) / "gone.bin"
    with pytest.raises(StorageError, match="gone.bin: (there is no such file|no such bucket or object)"):
        read(path)


def test_missing_buckets_are_named(s3_server):
    with pytest.raises(StorageError, match="there is no bucket 'nowhere'"):
        storage.list_files("s3://nowhere/folder", "*")
    with pytest.raises(StorageError, match="s3://nowhere: there is no such bucket"):
        storage.list_files("s3://nowhere", "*")
    with pytest.raises(StorageError, match="s3://nowhere/x"):
        storage.write_bytes("s3://nowhere/x", b"1")


def test_a_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("s3fs", "gcsfs"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if n.partition(".")[0] in ("s3fs", "gcsfs")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    from fsspec.registry import _registry as known

    for name in ("s3", "gs"):
        monkeypatch.delitem(known, name, raising=False)
    with pytest.raises(StorageError, match=r'pip install "megavlm\[s3\]"'):
        storage.read_bytes("s3://data/x")
    with pytest.raises(StorageError, match=r'pip install "megavlm\[gcs\]"'):
        storage.read_bytes("gs://data/x")


def test_missing_credentials_are_told(s3_server, monkeypatch, tmp_path):
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="no credentials for s3://"):
        storage.read_bytes("s3://data/x")
    s3fs.S3FileSystem.clear_instance_cache()


def test_addresses():
    url = Url("s3://bucket/folder") / "a.tar"
    assert (url.name, str(url.parent), url.protocol, str(url)) == ("a.tar", "s3://bucket/folder", "s3", "s3://bucket/folder/a.tar")
    assert storage.is_remote("gs://b/x")
    assert not storage.is_remote("file:///b/x")
    with pytest.raises(StorageError, match="nonsense://"):
        storage.read_bytes("nonsense://x/y")
