"""Videos: files whose frames are sampled at a rate, and folders of frames that were cut already."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from typing import Any

from megavlm.data.prepare.captions import caption_text, captioned
from megavlm.data.prepare.conversations import check_messages, role_of
from megavlm.data.prepare.files import PICTURE_SUFFIXES, PictureFinder, is_folder, parent, refusing, suffix, walk
from megavlm.data.prepare.records import RECORD_SUFFIXES, identity, read_record, record_entries, text_field
from megavlm.data.prepare.types import Draft, Entry, Format, Picture, PrepareError, PrepareOptions, Refused
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.storage import StorageError, open_read

VIDEO_SUFFIXES = frozenset({"mp4", "m4v", "mkv", "webm", "mov", "avi", "mpg", "mpeg", "ts", "flv", "ogv", "wmv"})
VIDEO_MARK = "<video>"
_JPEG_QUALITY = 95
_RATE_SLACK_S = 1e-6


class _Clips(Format):
    """Shared: a manifest (video, and caption or conversations), or a folder with a .txt beside each clip."""

    default_task = "video"
    samples_per_shard = 100
    fields = ("id", "video", "caption", "conversations", "messages")

    def __init__(self, asked: PrepareOptions) -> None:
        super().__init__(asked)
        self.has_manifest = suffix(asked.input) in RECORD_SUFFIXES
        self.clips = PictureFinder(asked.images or (parent(asked.input) if self.has_manifest else asked.input))
        if not asked.fps > 0:
            raise PrepareError(f"--fps {asked.fps} must be above 0")
        if asked.max_frames < 1:
            raise PrepareError(f"--max-frames {asked.max_frames} must be at least 1")

    def entries(self) -> Iterator[tuple[Entry, float]]:
        if self.has_manifest:
            yield from record_entries(self.asked.input, (self.column("video"),))
            return
        if not is_folder(self.asked.input):
            raise PrepareError(f"{self.asked.input}: neither a folder nor a file that ends in .{', .'.join(RECORD_SUFFIXES)}")
        if self.columns or self.asked.images:
            raise PrepareError(f"{self.asked.input} is a folder: --columns and --images go with a manifest")
        names = walk(self.asked.input)
        clips = self.in_folder(names)
        if not clips:
            raise PrepareError(f"{self.asked.input}: found {self.wanted}")
        texts = {n.rpartition(".")[0] for n in names if suffix(n) == "txt"}
        for number, (name, base, payload) in enumerate(clips):
            yield Entry(f"{self.asked.input}/{name}", ("beside", name, base, base in texts, payload)), (number + 1) / len(clips)

    wanted = ""

    def in_folder(self, names: list[str]) -> list[tuple[str, str, Any]]:
        """(name, name of its .txt without suffix, what `frames` needs) of each clip."""
        raise NotImplementedError

    def frames(self, name: str, payload: Any) -> list[Picture]:
        """Sampled frames of one clip in order of time."""
        raise NotImplementedError

    def convert(self, entry: Entry) -> Iterator[Draft | Refused]:
        if entry.payload[0] == "beside":
            _, name, base, has_text, payload = entry.payload
            if not has_text:
                raise Refused("no caption", f"there is no {base}.txt beside it")
            caption = caption_text(self.clips.read(f"{base}.txt", "caption"))
            yield captioned(caption, self.frames(name, payload), self.asked.prompt, meta={"id": name})
            return
        record = read_record(entry)
        name = text_field(record, self.column("video"), "video")
        turns = next((v for n in ("conversations", "messages") if (v := record.get(self.column(n))) is not None), None)
        meta = {"id": name, **identity(record, self.column("id"))}
        if turns is None:
            caption = text_field(record, self.column("caption"), "caption")
            yield captioned(caption, self.frames(name, None), self.asked.prompt, meta=meta)
            return
        messages = _messages(turns)
        frames = self.frames(name, None)
        for message in messages:
            message["content"] = message["content"].replace(VIDEO_MARK, IMAGE_TOKEN * len(frames))
        yield Draft(check_messages(messages, len(frames)), frames, meta=meta)

    def check_count(self, count: int, name: str) -> None:
        """Raises Refused for more frames than asked for: leaving some out would not be the rate that was asked for."""
        if count > self.asked.max_frames:
            raise Refused("too many frames", f"{name}: {count} or more at {self.asked.fps:g} a second; lower --fps or raise --max-frames")


def _messages(turns: Any) -> list[dict[str, str]]:
    if not isinstance(turns, list) or not all(isinstance(t, dict) for t in turns):
        raise Refused("no conversation", f"conversations is {turns!r:.80}")
    messages = []
    for i, turn in enumerate(turns):
        content = turn.get("value", turn.get("content"))
        if not isinstance(content, str):
            raise Refused("turn without text", f"message {i} holds {content!r:.80}")
        if IMAGE_TOKEN in content:
            raise Refused(f'"{IMAGE_TOKEN}" beside a video', f'message {i}: write "{VIDEO_MARK}" where its frames go')
        messages.append({"role": role_of(turn.get("from", turn.get("role")), i), "content": content})
    marks = sum(m["content"].count(VIDEO_MARK) for m in messages)
    if marks != 1:
        raise Refused(f'wrong number of "{VIDEO_MARK}"', f'{marks} "{VIDEO_MARK}" in the texts, 1 video')
    return messages


class Video(_Clips):
    """Video files. Frames are encoded anew, as their bytes lie in no file."""

    name = "video"
    help = "Video files with a .txt beside each, or a manifest (video, and caption or conversations with <video>)."
    options = frozenset({"columns", "prompt", "fps", "max_frames", "frame_format"})
    wanted = f"no video below this folder (.{', .'.join(sorted(VIDEO_SUFFIXES))})"

    def in_folder(self, names: list[str]) -> list[tuple[str, str, Any]]:
        return [(n, n.rpartition(".")[0], None) for n in names if suffix(n) in VIDEO_SUFFIXES]

    def frames(self, name: str, payload: Any) -> list[Picture]:
        """The first frame at or after each multiple of 1/fps, so the first frame always."""
        try:
            import av
        except ImportError as error:
            raise PrepareError('videos need PyAV: pip install "megavlm[video]"') from error
        kept: list[Picture] = []
        try:
            path = self.clips.find(name, "video")
            with refusing(path, "video"), open_read(path) as file, av.open(file, mode="r") as container:
                if not container.streams.video:
                    raise Refused("file without a video track", name)
                start, due = None, 0
                for frame in container.decode(video=0):
                    if frame.time is None:
                        raise Refused("video without times", f"{name}: frame {len(kept)} says no time")
                    start = frame.time if start is None else start
                    time_s = frame.time - start
                    if time_s + _RATE_SLACK_S < due / self.asked.fps:
                        continue
                    due = math.floor((time_s + _RATE_SLACK_S) * self.asked.fps) + 1
                    self.check_count(len(kept) + 1, name)
                    kept.append(Picture(self._encode(frame), round(time_s, 6)))
        except StorageError:
            raise
        except (av.FFmpegError, ValueError) as error:
            raise Refused("unreadable video", f"{name}: {error}") from None
        if not kept:
            raise Refused("unreadable video", f"{name}: it holds no frame")
        return kept

    def _encode(self, frame: Any) -> bytes:
        picture = frame.to_image()
        if turn := getattr(frame, "rotation", 0):  # how the camera was held
            picture = picture.rotate(turn, expand=True)
        out = io.BytesIO()
        if self.asked.frame_format == "png":
            picture.save(out, "PNG")
        else:
            picture.save(out, "JPEG", quality=_JPEG_QUALITY)
        return out.getvalue()


class Frames(_Clips):
    """Folders of pictures, a folder a video, in natural order of their names ("frame2" before "frame10")."""

    name = "frames"
    help = "Folders of frame pictures, each with a .txt of its name beside it, or a manifest (video = folder)."
    options = frozenset({"columns", "prompt", "fps", "input_fps", "max_frames"})
    wanted = "no folder that holds pictures"

    def __init__(self, asked: PrepareOptions) -> None:
        super().__init__(asked)
        if not asked.input_fps > 0:
            raise PrepareError(f"--input-fps {asked.input_fps} must be above 0")

    def in_folder(self, names: list[str]) -> list[tuple[str, str, Any]]:
        by_folder: dict[str, list[str]] = {}
        for name in names:
            folder, slash, base = name.rpartition("/")
            if slash and suffix(base) in PICTURE_SUFFIXES:
                by_folder.setdefault(folder, []).append(base)
        return [(folder, folder, sorted(found, key=_natural)) for folder, found in by_folder.items()]

    def frames(self, name: str, payload: Any) -> list[Picture]:
        if payload is None:
            place = str(self.clips.find(name, "video"))
            if not is_folder(place):
                raise Refused("missing video", f"{place}: there is no such folder")
            payload = sorted((n for n in walk(place) if "/" not in n and suffix(n) in PICTURE_SUFFIXES), key=_natural)
        rate, kept = self.asked.input_fps, []
        due = 0
        for number, file in enumerate(payload):
            time_s = number / rate
            if time_s + _RATE_SLACK_S < due / self.asked.fps:
                continue
            due = math.floor((time_s + _RATE_SLACK_S) * self.asked.fps) + 1
            kept.append((f"{name.rstrip('/')}/{file}", round(time_s, 6)))
        self.check_count(len(kept), name)
        if not kept:
            raise Refused("missing video", f"{name}: the folder holds no picture")
        return [Picture(self.clips.load(file), time_s) for file, time_s in kept]


def _natural(name: str) -> tuple[Any, ...]:
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part)
