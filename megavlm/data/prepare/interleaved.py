"""Interleaved documents: OBELICS (parallel lists of texts and images) and MMC4 (sentences, and pictures matched to them)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megavlm.data.prepare.conversations import check_messages
from megavlm.data.prepare.records import RecordFormat, identity, read_record
from megavlm.data.prepare.types import Draft, Entry, Picture, Refused
from megavlm.data.sample import IMAGE_TOKEN

Piece = tuple[str, Any]
"""("text", the text) or ("image", the picture's address)."""


class Interleaved(RecordFormat):
    """A web page as pictures and texts in their order.

    Pictures stand in user turns and the texts after them in assistant turns, so that all text behind the first picture is learned.
    Text before the first picture is context in the first user turn. Pictures behind the last text teach nothing and are left out.
    """

    name = "interleaved"
    help = 'Documents: OBELICS ("texts" and "images" side by side) or MMC4 ("text_list", "image_info").'
    default_task = "interleaved"
    options = frozenset({"columns", "missing_pictures"})
    fields = ("id", "texts", "images", "text_list", "image_info", "image_name", "matched_text_index")

    def convert(self, entry: Entry) -> Iterator[Draft | Refused]:
        record = read_record(entry)
        is_mmc4 = record.get(self.column("text_list")) is not None
        pieces, separator = (self._mmc4(record), " ") if is_mmc4 else (self._obelics(record), "\n\n")
        notes: dict[str, int] = {}
        loaded: list[Piece] = []
        for kind, value in pieces:
            if kind == "text":
                if IMAGE_TOKEN in value:
                    raise Refused(f'"{IMAGE_TOKEN}" as text', f'a text spells "{IMAGE_TOKEN}"')
                loaded.append((kind, value))
                continue
            try:
                loaded.append((kind, Picture(self.pictures.load(value))))
            except Refused as refused:
                if self.asked.missing_pictures == "refuse":
                    raise
                note = f"pictures left out of documents: {refused.reason}"
                notes[note] = notes.get(note, 0) + 1
        messages, pictures, behind = _turns(loaded, separator)
        if behind:
            notes["pictures left out of documents: no text behind them"] = behind
        yield Draft(check_messages(messages, len(pictures)), pictures, meta=identity(record, self.column("id")), notes=notes)

    def _obelics(self, record: dict[str, Any]) -> list[Piece]:
        texts, images = record.get(self.column("texts")), record.get(self.column("images"))
        if not isinstance(texts, list) or not isinstance(images, list):
            raise Refused("no document", f"texts and images must be lists (fields: {', '.join(map(str, record))})")
        if len(texts) != len(images):
            raise Refused("lists of unequal length", f"{len(texts)} texts and {len(images)} images")
        pieces: list[Piece] = []
        for i, (text, image) in enumerate(zip(texts, images, strict=True)):
            if text and image:
                raise Refused("text and picture in one place", f"texts[{i}] and images[{i}] are both set")
            if text and not isinstance(text, str):
                raise Refused("text that is no text", f"texts[{i}] is {text!r:.60}")
            if image:
                pieces.append(("image", image))
            elif text and text.strip():
                pieces.append(("text", text.strip()))
        return pieces

    def _mmc4(self, record: dict[str, Any]) -> list[Piece]:
        texts, infos = record[self.column("text_list")], record.get(self.column("image_info")) or []
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts) or not isinstance(infos, list):
            raise Refused("no document", "text_list must be a list of texts, and image_info a list")
        before: dict[int, list[Any]] = {}
        for i, info in enumerate(infos):
            place = info.get(self.column("matched_text_index")) if isinstance(info, dict) else None
            name = info.get(self.column("image_name")) if isinstance(info, dict) else None
            if not isinstance(place, int) or not 0 <= place < len(texts):
                raise Refused("picture matched to no text", f"image_info[{i}] has matched_text_index={place!r:.40}, of {len(texts)} texts")
            if not name:
                raise Refused("picture without address", f"image_info[{i}] has no image_name")
            before.setdefault(place, []).append(name)
        pieces: list[Piece] = []
        for i, text in enumerate(texts):
            pieces += [("image", name) for name in before.get(i, [])]
            if text.strip():
                pieces.append(("text", text.strip()))
        return pieces


def _turns(pieces: list[Piece], separator: str) -> tuple[list[dict[str, str]], list[Picture], int]:
    """Messages, pictures in their order, and how many pictures behind the last text were left out."""
    last = max((i for i, (kind, _) in enumerate(pieces) if kind == "text"), default=-1)
    behind = sum(kind == "image" for kind, _ in pieces[last + 1 :])
    pieces = pieces[: last + 1]
    first = next((i for i, (kind, _) in enumerate(pieces) if kind == "image"), None)
    if first is None:
        raise Refused("document without pictures", f"{len(pieces)} texts, and no picture that has text behind it")
    lead = separator.join(value for _, value in pieces[:first])
    messages: list[dict[str, str]] = []
    pictures: list[Picture] = []
    for kind, value in pieces[first:]:
        role = "user" if kind == "image" else "assistant"
        if kind == "image":
            pictures.append(value)
        text = IMAGE_TOKEN if kind == "image" else value
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += text if kind == "image" else separator + text
        else:
            messages.append({"role": role, "content": text})
    if lead:
        messages[0]["content"] = lead + separator + messages[0]["content"]
    return messages, pictures, behind
