"""Existing WebDataset tars: pictures with a .txt or a .json under the same key, and our own shards again."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from megavlm.data.prepare.captions import caption_text, captioned, unread_picture
from megavlm.data.prepare.conversations import Messages, check_messages
from megavlm.data.prepare.files import PICTURE_SUFFIXES, UNREAD_PICTURE_SUFFIXES, below, is_folder, suffix, walk
from megavlm.data.prepare.types import Draft, Entry, Format, Picture, PrepareError, PrepareOptions, Refused, left_out
from megavlm.data.storage import StorageError, as_path, open_read, read_ranges, stamp

Member = tuple[str, int, int]
"""Name, offset and size in bytes."""


class WebDatasetTars(Format):
    """Samples of other WebDatasets. A sample is what shares the name up to the first dot; tar headers alone are read to find them."""

    name = "webdataset"
    help = "WebDataset tars: jpg/png/webp/... with txt or json (caption, messages or conversations) per key; also our own shards."
    default_task = "caption"
    options = frozenset({"columns", "prompt"})
    fields = ("caption", "score.*")

    def __init__(self, asked: PrepareOptions) -> None:
        super().__init__(asked)
        self.messages = Messages(asked)
        self.scores = {k.removeprefix("score."): v for k, v in self.columns.items() if k.startswith("score.")}

    def entries(self) -> Iterator[tuple[Entry, float]]:
        path = self.asked.input
        files = [path] if not is_folder(path) else below(path, [n for n in walk(path) if suffix(n) == "tar"])
        if not files:
            raise PrepareError(f"{path}: the folder holds no .tar file")
        sizes = [max(1, stamp(f).size_bytes) for f in files]
        done = 0
        for file, size in zip(files, sizes, strict=True):
            version = tuple(stamp(file))
            passed: dict[str, list[str]] = {}
            try:
                for key, members in groupby(_members(file, passed), key=lambda m: _key(m[0])):
                    group = tuple(members)
                    yield Entry(f"{file}: sample {key!r}", ("tar", file, version, key, group)), (done + group[-1][1]) / sum(sizes)
            except (tarfile.TarError, EOFError) as error:
                if sum(sizes) == size and done == 0 and isinstance(error, tarfile.ReadError) and "truncated" not in str(error):
                    raise PrepareError(f"{file}: not an uncompressed tar file: {error}") from error
                yield Entry(file, ("broken", file, str(error))), (done + size) / sum(sizes)
            for note, names in sorted(passed.items()):
                yield left_out(file, note, names), (done + size) / sum(sizes)
            done += size

    def convert(self, entry: Entry) -> Iterator[Draft | Refused]:
        if entry.payload[0] == "broken":
            raise Refused("tar file that ends too early", f"what lies behind the break is lost: {entry.payload[2]}")
        _, file, _, key, members = entry.payload
        names = [m[0][len(key) :].lstrip(".").lower() for m in members]
        if twice := sorted(n for n, count in Counter(names).items() if count > 1):
            raise Refused("two members of one name", f"{key}.{twice[0]} is there more than once (capitals do not count)")
        if unread := [n for n in names if suffix(f".{n}") in UNREAD_PICTURE_SUFFIXES]:
            raise unread_picture(f"{key}.{unread[0]}")
        found = dict(zip(names, self._read(file, members), strict=True))
        pictures = {name: data for name, data in found.items() if suffix(f".{name}") in PICTURE_SUFFIXES}
        others = sorted(set(found) - set(pictures) - {"txt", "json", "caption", "cls"})
        notes = {f"members left out: .{name.rpartition('.')[2]}": 1 for name in others}
        fields = _fields(found["json"]) if "json" in found else {}
        if "messages" in fields or "conversations" in fields or ("objects" in fields and isinstance(fields.get("task"), str)):
            draft = self._conversation(fields, pictures)
        else:
            if not pictures:
                raise Refused("no picture", f"the key has only .{', .'.join(found)}")
            caption = self._caption(found, fields)
            draft = captioned(caption, [Picture(d) for d in pictures.values()], self.asked.prompt)
        draft.scores.update({name: _score(fields, column) for name, column in self.scores.items()})
        draft.meta.setdefault("id", key)
        draft.notes.update(notes)
        yield draft

    def _read(self, file: str, members: tuple[Member, ...]) -> list[bytes]:
        try:
            found = read_ranges(as_path(file), [(offset, size) for _, offset, size in members])
        except StorageError as error:
            raise PrepareError(f"{error}. The tar changed while it was read") from error
        for (name, _, size), data in zip(members, found, strict=True):
            if len(data) != size:
                raise Refused("tar file that ends too early", f"{name} should have {size} bytes, and has {len(data)}")
        return found

    def _caption(self, found: dict[str, bytes], fields: dict[str, Any]) -> str:
        name = self.column("caption")
        for member in ("txt", "caption") if name == "caption" else ():
            if member in found:
                return caption_text(found[member])
        value = fields.get(name)
        if value is None:
            raise Refused("no caption", f"neither .txt nor {name!r} in .json (members: .{', .'.join(found)})")
        if not isinstance(value, str) or not value.strip():
            raise Refused("empty caption", f"{name!r} in .json holds {value!r:.60}")
        return value

    def _conversation(self, fields: dict[str, Any], pictures: dict[str, bytes]) -> Draft:
        turns = fields.get("messages", fields.get("conversations", [] if "objects" in fields else None))
        if not isinstance(turns, list):
            raise Refused("no conversation", f"messages is {turns!r:.60}")
        messages, inline = self.messages.turns(turns)
        listed = fields.get("images")
        entries = [i for i in listed if isinstance(i, dict) and "file" in i] if isinstance(listed, list) else []
        if entries:  # our own shards: images says which file comes when
            by_name = {str(e["file"]).partition(".")[2].lower(): e.get("time_s") for e in entries}
            missing = [n for n in by_name if n not in pictures]
            if missing:
                raise Refused("missing picture", f"no member .{missing[0]}, which images names")
            ordered = [Picture(pictures[n], time) for n, time in by_name.items()]
        else:
            ordered = [Picture(d) for d in pictures.values()]
        if inline and any(a is not None for a in inline):
            raise Refused("pictures named twice", "parts of the messages name pictures by address; in a tar they are its members, in order")
        only_objects = bool(fields.get("objects")) and not messages  # our own shards: pictures with labelled boxes, and nothing said
        draft = Draft([] if only_objects else check_messages(messages, len(ordered)), ordered, task="conversation")
        for name in ("task", "split", "source"):
            if isinstance(fields.get(name), str) and fields[name]:
                setattr(draft, name, fields[name])
        for name, kind in (("weight", int | float), ("scores", dict), ("meta", dict), ("objects", list)):
            if isinstance(fields.get(name), kind):
                setattr(draft, name, fields[name])
        return draft


def _members(file: str, passed: dict[str, list[str]]) -> Iterator[Member]:
    """Members that hold data, in order; the names of others go to `passed` by what they are (folders say nothing and are not told)."""
    with open_read(as_path(file)) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members = []  # type: ignore[attr-defined] # it would keep every header
            base = info.name.rpartition("/")[2]
            if not info.isreg():
                if not info.isdir():
                    passed.setdefault("members left out: links, pipes and devices", []).append(info.name)
            elif base.startswith("."):
                passed.setdefault("members left out: hidden files", []).append(info.name)
            else:
                if info.offset_data + info.size > _size(stream):
                    raise tarfile.ReadError(f"truncated: {info.name} goes beyond the end of the file")
                yield info.name, info.offset_data, info.size


def _size(stream: Any) -> int:
    at = stream.tell()
    size = int(stream.seek(0, 2))
    stream.seek(at)
    return size


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.split(".", 1)[0]


def _fields(data: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Refused("broken .json", str(error)) from None
    if not isinstance(fields, dict):
        raise Refused("broken .json", f"it is a {type(fields).__name__}, and fields are wanted")
    return fields


def _score(fields: dict[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Refused("score that is no number", f"{name!r} in .json is {value!r:.60}")
    try:
        return float(value)
    except OverflowError:
        raise Refused("score that is no number", f"{name!r} in .json has more digits than a number can") from None
