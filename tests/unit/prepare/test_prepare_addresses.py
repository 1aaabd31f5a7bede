"""What a data set may name: nothing outside its folder, nothing on the web, nothing that blocks; and how folders are walked."""

from __future__ import annotations

import errno
import json
import os

import pytest

from megavlm.data.prepare import PrepareError, files
from megavlm.data.prepare.files import PictureFinder, walk
from megavlm.data.prepare.types import Refused
from megavlm.data.storage import StorageError

TURNS = [{"from": "human", "value": "<image>\nWhich digit?"}, {"from": "gpt", "value": "3"}]


@pytest.fixture
def no_network(monkeypatch):
    """Whatever would leave this machine fails the test."""
    import socket

    def refuse(*_, **__):
        raise AssertionError("a data set made prepare open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)


BAD = {
    "http://127.0.0.1:9/a.png": "on the web",
    "HTTP://127.0.0.1:9/a.png": "on the web",
    "https://127.0.0.1:9/a.png": "on the web",
    "ftp://127.0.0.1:9/a.png": "of an unknown protocol",
    "foo://a.png": "of an unknown protocol",
    "simplecache::http://127.0.0.1:9/a.png": "of an unknown protocol",
    "filecache::http://127.0.0.1:9/a.png": "of an unknown protocol",
    "s3://bucket/a.png::http://127.0.0.1:9/a.zip": "of an unknown protocol",
    "\ud800.png": "without address",
    "../outside.png": "outside its folder",
    "deep/../../outside.png": "outside its folder",
    "/etc/passwd": "outside its folder",
    "file:///etc/passwd": "outside its folder",
    "FILE:///etc/passwd": "outside its folder",
    "loop": "that cannot be opened",
    "pipe.png": "that cannot be opened",
    "a" * 300: "that cannot be opened",
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", BAD)
def test_bad_address_is_one_refused_row(name, run, lines, pictures, make_digit):
    (pictures.parent / "outside.png").write_bytes(make_digit(1))
    (pictures / "loop").symlink_to("loop")
    os.mkfifo(pictures / "pipe.png")
    rows = [{"image": "1.png", "conversations": TURNS}, {"image": name, "conversations": TURNS}]
    done = run("llava", lines(*rows), images=str(pictures))
    assert done.refused == {f"picture {BAD[name]}": 1} and len(done.samples) == 1


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("name", BAD)
def test_bad_address_of_a_video(name, pictures):
    pytest.importorskip("av")
    from megavlm.data.prepare import PrepareOptions
    from megavlm.data.prepare.video import Video

    (pictures / "loop").symlink_to("loop")
    os.mkfifo(pictures / "pipe.png")
    video = Video(PrepareOptions("video", str(pictures / "m.jsonl"), "out"))
    with pytest.raises(Refused) as refused:
        video.frames(name, None)
    assert refused.value.reason == f"video {BAD[name]}"


def test_names_below_the_folder(pictures, tmp_path, monkeypatch):
    data = (pictures / "1.png").read_bytes()
    (tmp_path / "link").symlink_to(pictures)
    for root, name in (
        (str(pictures), "1.png"),
        (str(pictures), "deep/../1.png"),
        (str(pictures), f"{pictures}/1.png"),
        (str(pictures), f"file://{pictures}/1.png"),
        (str(tmp_path / "link"), f"{pictures}/1.png"),
        ("/", f"{pictures}/1.png"),
    ):
        assert PictureFinder(root).load(name) == data
    monkeypatch.chdir(pictures)
    assert PictureFinder(None).load("1.png") == PictureFinder(".").load(f"{pictures}/1.png") == data
    with pytest.raises(Refused):
        PictureFinder(f"{pictures}/deep").load(f"{pictures}/deep-secret.png")


def test_names_below_a_store():
    finder = PictureFinder("memory://bucket/pictures")
    assert str(finder.find("a/b.png", "picture")) == "memory://bucket/pictures/a/b.png"
    assert str(finder.find("memory://other/b.png", "picture")) == "memory://other/b.png"
    for name in ("../secret.png", "a/../../secret.png", "/etc/passwd", "x::y.png"):
        with pytest.raises(Refused, match="outside its folder"):
            finder.find(name, "picture")


@pytest.mark.parametrize("format_name", ["captions", "llava"])
def test_a_failing_disk_stops_the_run(format_name, run, lines, pictures, monkeypatch):
    for i in range(7):
        (pictures / f"{i}.txt").write_text("a digit")
    real = files.read_bytes

    def failing(path):
        if str(path).endswith(".txt" if format_name == "captions" else "1.png"):
            raise StorageError(f"{path}: the disk died") from OSError(errno.EIO, "input/output error")
        return real(path)

    monkeypatch.setattr(files, "read_bytes", failing)
    with pytest.raises(StorageError, match="the disk died"):
        if format_name == "captions":
            run("captions", pictures)
        else:
            run("llava", lines({"image": "1.png", "conversations": TURNS}), images=str(pictures))


def test_walk_enters_each_folder_once(tmp_path):
    (tmp_path / "z" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "elsewhere" / "far.png").touch()
    (tmp_path / "z").rename(tmp_path / "root" / "z")
    for name in ("top.png", "z/deep/a.png", "z/deep/b.png"):
        (tmp_path / "root" / name).touch()
    (tmp_path / "root" / "self").symlink_to(".")
    (tmp_path / "root" / "a").symlink_to("z/deep")
    (tmp_path / "root" / "far").symlink_to("../elsewhere")
    assert walk(tmp_path / "root") == ["far/far.png", "top.png", "z/deep/a.png", "z/deep/b.png"]


def test_walk_follows_a_link_as_its_root(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").touch()
    (tmp_path / "link").symlink_to("real")
    assert walk(tmp_path / "link") == ["a.png"]


def test_input_that_is_a_pipe(tmp_path, run):
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(PrepareError, match="no plain file"):
        run("llava", tmp_path / "x.jsonl")


def test_huge_numbers(tmp_path, run, lines, pictures):
    path = lines({"image": "1.png", "conversations": TURNS})
    path.write_text(path.read_text() + '{"id": ' + "1" * 5000 + "}\n")
    assert run("llava", path, images=str(pictures)).refused == {"line that is not JSON": 1}
    (tmp_path / "x.json").write_text('[{"id": ' + "1" * 5000 + "}]")
    with pytest.raises(PrepareError, match="x.json: not valid JSON.*5000 digits"):
        run("llava", tmp_path / "x.json", images=str(pictures))


@pytest.mark.parametrize("value", [False, 1, 2.5])
def test_short_array_that_ends_in_a_number(value, tmp_path, run):
    (tmp_path / "x.json").write_text(json.dumps([value]))
    with pytest.raises(PrepareError, match="record that is no object"):
        run("llava", tmp_path / "x.json")
