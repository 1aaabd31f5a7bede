"""Video files and folders of frames: which frames, at which times."""

from __future__ import annotations

import io
import json

import av
import numpy as np
import pytest
from PIL import Image

from megavlm.data.prepare import PrepareError


def film(path, num_frames, rate, codec="mpeg4", left_half=False):
    """A film whose frame i is all of the grey 5 i, or one with a white left half."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(num_frames):
            picture = np.full((48, 64, 3), 0 if left_half else i * 5, np.uint8)
            if left_half:
                picture[:, :32] = 255
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def greys(sample):
    return [float(np.asarray(Image.open(io.BytesIO(p)).convert("L")).mean()) for p in sample["pictures"]]


def times(sample):
    return [i["time_s"] for i in sample["images"]]


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    (folder / "sub").mkdir(parents=True)
    film(folder / "a.mkv", 50, 10, "ffv1")
    film(folder / "sub" / "b.mp4", 25, 25)
    for name in ("a", "sub/b"):
        (folder / f"{name}.txt").write_text(f"film {name}")
    return folder


@pytest.mark.parametrize("fps, every", [(1.0, 10), (2.0, 5), (10.0, 1), (4.0, None)])
def test_frames_are_the_first_at_or_after_each_beat(fps, every, clips, run):
    done = run("video", clips, fps=fps, max_frames=100, frame_format="png")
    sample = done.samples[0]
    # What the rule says, from the film's own times 0, 0.1, ..., 4.9: the first frame at or after each k / fps.
    beats = np.arange(0, 4.9 + 1e-9, 1 / fps)
    wanted = sorted({int(np.ceil(b * 10 - 1e-6)) for b in beats})
    if every:
        assert wanted == list(range(0, 50, every))
    assert times(sample) == pytest.approx([i / 10 for i in wanted])
    assert greys(sample) == pytest.approx([i * 5 for i in wanted], abs=2)
    assert sample["messages"][0]["content"] == "<image>" * len(wanted)
    assert [t[1] for t in done.texts] == ["film a", "film sub/b"]
    assert {i["file"].rpartition(".")[2] for i in sample["images"]} == {"png"}


def test_manifest_with_conversations(clips, run, lines):
    turns = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "It gets brighter."}]
    bad = [
        {"video": "a.mkv", "conversations": [{"from": "human", "value": "no mark"}, turns[1]]},
        {"video": "none.mp4", "caption": "x"},
        {"caption": "x"},
        {"video": "a.txt", "caption": "x"},
    ]
    path = lines({"video": "a.mkv", "conversations": turns}, {"video": "sub/b.mp4", "caption": "short"}, *bad)
    done = run("video", path, images=str(clips), fps=1.0)
    assert done.texts == [["<image>" * 5 + "\nWhat happens?", "It gets brighter."], ["<image>", "short"]]
    assert done.refused == {'wrong number of "<video>"': 1, "missing video": 1, "no video": 1, "unreadable video": 1}


def test_too_many_frames_are_refused_not_thinned(clips, run):
    done = run("video", clips, fps=10.0, max_frames=20)
    assert done.refused == {"too many frames": 1}
    assert [t[1] for t in done.texts] == ["film sub/b"]


def test_turned_camera(tmp_path, run):
    """A film with a display matrix comes out upright."""
    folder = tmp_path / "turned"
    folder.mkdir()
    film(folder / "t.mp4", 3, 5, left_half=True)
    data = bytearray((folder / "t.mp4").read_bytes())
    # The track header's matrix instead of identity (ISO 14496-12, 6.2.2): x' = 48 - y, y' = x, so that left becomes top.
    header = data.index(b"tkhd") + 4
    at = header + 40
    turned = [0, 0x10000, 0, -0x10000 & 0xFFFFFFFF, 0, 0, 48 << 16, 0, 0x40000000]
    data[at : at + 36] = b"".join(v.to_bytes(4, "big") for v in turned)
    (folder / "t.mp4").write_bytes(data)
    (folder / "t.txt").write_text("film")
    done = run("video", folder)
    assert [(i["width"], i["height"]) for i in done.samples[0]["images"]] == [(48, 64)]
    upright = np.asarray(Image.open(io.BytesIO(done.samples[0]["pictures"][0])).convert("L"))
    assert upright[:28].min() > 230 and upright[36:].max() < 25


def test_folders_of_frames(tmp_path, run, make_digit):
    folder = tmp_path / "frames"
    (folder / "clip").mkdir(parents=True)
    for i in range(12):
        (folder / "clip" / f"f{i}.png").write_bytes(make_digit(i))
    (folder / "clip.txt").write_text("digits")
    (folder / "mute").mkdir()
    (folder / "mute" / "0.png").write_bytes(make_digit(0))
    done = run("frames", folder, input_fps=4.0, fps=2.0)
    assert done.refused == {"no caption": 1}
    assert times(done.samples[0]) == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]
    assert done.samples[0]["pictures"] == [make_digit(i) for i in (0, 2, 4, 6, 8, 10)]
    (tmp_path / "m.json").write_text(json.dumps([{"video": "clip", "caption": "digits"}, {"video": "gone", "caption": "x"}]))
    again = run("frames", tmp_path / "m.json", images=str(folder), input_fps=4.0, fps=2.0)
    assert again.samples[0]["pictures"] == done.samples[0]["pictures"]
    assert again.refused == {"missing video": 1}


def test_rates_are_checked(clips, run):
    with pytest.raises(PrepareError, match="--fps 0"):
        run("video", clips, fps=0.0)
