"""Picture and caption: a folder with a .txt beside every picture, or a manifest with columns."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from megavlm.data.prepare.conversations import check_messages
from megavlm.data.prepare.files import PICTURE_SUFFIXES, UNREAD_PICTURE_SUFFIXES, PictureFinder, is_folder, parent, suffix, walk
from megavlm.data.prepare.records import RECORD_SUFFIXES, identity, read_record, record_entries, text_field
from megavlm.data.prepare.types import Draft, Entry, Format, Picture, PrepareError, PrepareOptions, Refused, left_out
from megavlm.data.sample import IMAGE_TOKEN


def captioned(caption: str, pictures: list[Picture], prompt: str | None, **more: Any) -> Draft:
    """A user turn with the pictures (and the prompt), and the caption as the answer."""
    question = IMAGE_TOKEN * len(pictures) + (f"\n{prompt}" if prompt else "")
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": caption.strip()}]
    return Draft(check_messages(messages, len(pictures)), pictures, **more)


def unread_picture(name: str) -> Refused:
    """For a picture whose name says a format that is not read."""
    return Refused("picture of a format that is not read", f"{name}: convert it to JPEG, PNG or WebP")


def caption_text(data: bytes) -> str:
    """Text of a caption file. Raises Refused when it is not UTF-8 or empty."""
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise Refused("caption that is not UTF-8", str(error)) from None
    if not text:
        raise Refused("empty caption", "the file beside the picture holds only white space")
    return text


class Captions(Format):
    """Captions of single pictures."""

    name = "captions"
    help = "A folder of pictures with a .txt beside each, or a CSV/TSV/JSON/JSONL/Parquet manifest (image, caption)."
    default_task = "caption"
    options = frozenset({"columns", "prompt"})
    fields = ("id", "image", "caption", "score.*")

    def __init__(self, asked: PrepareOptions) -> None:
        super().__init__(asked)
        self.has_manifest = suffix(asked.input) in RECORD_SUFFIXES
        self.pictures = PictureFinder(asked.images or (parent(asked.input) if self.has_manifest else asked.input))
        self.scores = {k.removeprefix("score."): v for k, v in self.columns.items() if k.startswith("score.")}

    def entries(self) -> Iterator[tuple[Entry, float]]:
        if self.has_manifest:
            needed = (self.column("image"), self.column("caption"), *self.scores.values())
            yield from record_entries(self.asked.input, needed)
            return
        if not is_folder(self.asked.input):
            raise PrepareError(f"{self.asked.input}: neither a folder nor a file that ends in .{', .'.join(RECORD_SUFFIXES)}")
        if self.columns or self.asked.images:
            raise PrepareError(f"{self.asked.input} is a folder: --columns and --images go with a manifest")
        pictures, unread, texts = [], [], {}
        others: dict[str, list[str]] = {}
        for name in walk(self.asked.input):
            kind = suffix(name)
            if kind in PICTURE_SUFFIXES:
                pictures.append(name)
            elif kind in UNREAD_PICTURE_SUFFIXES:
                unread.append(name)
            elif kind == "txt":
                texts[name.rpartition(".")[0]] = name
            else:
                others.setdefault(
                    f"files left out, of no known picture format: .{kind}" if kind else "files left out, without a suffix", []
                ).append(name)
        if not pictures:
            raise PrepareError(f"{self.asked.input}: no pictures below this folder (.{', .'.join(sorted(PICTURE_SUFFIXES))})")
        for number, name in enumerate(pictures):
            base = name.rpartition(".")[0]
            entry = Entry(f"{self.asked.input}/{name}", ("beside", name, base in texts))
            yield entry, (number + 1) / len(pictures)
        for name in unread:
            yield Entry(f"{self.asked.input}/{name}", ("unread", name)), 1.0
        with_picture = {name.rpartition(".")[0] for name in (*pictures, *unread)}
        if orphans := [name for base, name in texts.items() if base not in with_picture]:
            others["captions left out, without a picture beside them"] = orphans
        for note, names in sorted(others.items()):
            yield left_out(self.asked.input, note, names), 1.0

    def convert(self, entry: Entry) -> Iterator[Draft | Refused]:
        if entry.payload[0] == "beside":
            yield self._beside(*entry.payload[1:])
            return
        if entry.payload[0] == "unread":
            raise unread_picture(entry.payload[1])
        record = read_record(entry)
        caption = text_field(record, self.column("caption"), "caption")
        pictures = [Picture(self.pictures.load(record.get(self.column("image"))))]
        scores = {name: _number(record.get(column), column) for name, column in self.scores.items()}
        yield captioned(caption, pictures, self.asked.prompt, scores=scores, meta=identity(record, self.column("id")))

    def _beside(self, name: str, has_text: bool) -> Draft:
        base = name.rpartition(".")[0]
        if not has_text:
            raise Refused("no caption", f"there is no {base}.txt beside the picture")
        caption = caption_text(self.pictures.read(f"{base}.txt", "caption"))
        return captioned(caption, [Picture(self.pictures.load(name))], self.asked.prompt, meta={"id": name})


def _number(value: Any, column: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise Refused("score that is no number", f"column {column!r} holds {value!r:.60}")
    return number
