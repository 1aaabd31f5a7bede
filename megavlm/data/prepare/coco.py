"""COCO annotation files: captions, and instances as grounding in both directions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from megavlm.data.grounding import NOTATIONS, GroundedBox, GroundingError, format_box, format_boxes
from megavlm.data.images import ImageError, measure_image
from megavlm.data.prepare.captions import captioned
from megavlm.data.prepare.conversations import check_messages
from megavlm.data.prepare.files import PictureFinder, parent
from megavlm.data.prepare.jsonstream import JsonStream
from megavlm.data.prepare.types import Draft, Entry, Format, Picture, PrepareError, PrepareOptions, Refused
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.storage import as_path, open_read

_PIXEL_NOTATIONS = ("qwen2.5-vl",)
"""Their numbers are pixels of the picture as a recipe resizes it, which no one knows here."""


class Coco(Format):
    """A picture's captions make a sample each; its instances one sample a direction, with a turn a category or box.

    Memory: the file is read as a stream, and of each annotation only its caption, or its category and box, is kept.
    """

    name = "coco"
    help = "COCO captions_*.json (captions) or instances_*.json (grounding, phrase to boxes and box to phrase)."
    default_task = "by what it holds: caption, grounding, referring"
    options = frozenset({"prompt", "directions", "notation"})

    def __init__(self, asked: PrepareOptions) -> None:
        super().__init__(asked)
        self.pictures = PictureFinder(asked.images or parent(asked.input))
        self.notation = asked.notation or NOTATIONS[0]
        known = [n for n in NOTATIONS if n not in _PIXEL_NOTATIONS]
        if self.notation in _PIXEL_NOTATIONS:
            raise PrepareError(
                f"notation {self.notation!r} writes pixels of the resized picture, and sizes are known only to a recipe: choose one of "
                f"{', '.join(known)}"
            )
        if self.notation not in NOTATIONS:
            raise PrepareError(f"notation {self.notation!r} is not one of {', '.join(known)}")

    def entries(self) -> Iterator[tuple[Entry, float]]:
        images, categories, captions, boxes = self._read()
        if not images or not (captions or boxes):
            raise PrepareError(f"{self.asked.input}: not a COCO file with images and annotations (captions, or bbox and category_id)")
        if boxes and self.asked.prompt is not None:
            raise PrepareError("--prompt goes with captions; instances bring their questions")
        for number, (image_id, (name, width, height)) in enumerate(images.items()):
            where = f"{self.asked.input}: image {image_id!r}"
            of_image = [(categories.get(c), box, crowd) for c, box, crowd in boxes.pop(image_id, [])]
            payload = ("coco", image_id, name, width, height, captions.pop(image_id, []), of_image)
            yield Entry(where, payload), (number + 1) / len(images)
        for image_id in [*captions, *boxes]:
            yield Entry(f"{self.asked.input}: image {image_id!r}", ("orphan", image_id)), 1.0

    def _read(self) -> tuple[dict[Any, Any], dict[Any, str], dict[Any, list[str]], dict[Any, list[Any]]]:
        images: dict[Any, Any] = {}
        categories: dict[Any, str] = {}
        captions: dict[Any, list[str]] = defaultdict(list)
        boxes: dict[Any, list[Any]] = defaultdict(list)
        with open_read(as_path(self.asked.input)) as file:
            stream = JsonStream(file, self.asked.input)
            if stream.peek() != "{":
                raise PrepareError(f"{self.asked.input}: not a COCO file, which is a JSON object")
            for key in stream.object():
                if key == "images":
                    for item in stream.array():
                        images[item.get("id")] = (item.get("file_name"), item.get("width"), item.get("height"))
                elif key == "categories":
                    categories.update({c.get("id"): c.get("name") for c in stream.array()})
                elif key == "annotations":
                    for item in stream.array():
                        if isinstance(item.get("caption"), str):
                            captions[item.get("image_id")].append(item["caption"])
                        elif "bbox" in item:
                            numbers = tuple(item["bbox"]) if isinstance(item["bbox"], list) else ()
                            boxes[item.get("image_id")].append((item.get("category_id"), numbers, bool(item.get("iscrowd"))))
                else:
                    stream.skip()
        return images, categories, captions, boxes

    def convert(self, entry: Entry) -> Iterator[Draft | Refused]:
        if entry.payload[0] == "orphan":
            raise Refused("annotations of an unknown picture", f"images does not list {entry.payload[1]!r}")
        _, image_id, name, width, height, captions, boxes = entry.payload
        if not captions and not boxes:
            raise Refused("picture without annotations", f"{name}")
        picture = Picture(self.pictures.load(name))
        for caption in captions:
            if not caption.strip():
                yield Refused("empty caption", f"{name}")
                continue
            yield captioned(caption, [picture], self.asked.prompt, task="caption", meta={"id": image_id})
        if boxes:
            yield from self._grounding(picture, (width, height), boxes, {"id": image_id, "notation": self.notation})

    def _grounding(self, picture: Picture, said: tuple[Any, Any], boxes: list[Any], meta: dict[str, Any]) -> Iterator[Draft | Refused]:
        try:
            measured = measure_image(picture.data)
        except ImageError as error:
            raise Refused("unreadable picture", str(error)) from None
        size = (measured.width, measured.height)
        if said != size:
            raise Refused(
                "picture of another size", f"the annotations are for {said[0]}x{said[1]} pixels, the picture has {size[0]}x{size[1]}"
            )
        found, crowds = [], 0
        for phrase, numbers, is_crowd in boxes:
            if is_crowd:
                crowds += 1
                continue
            if phrase is None or len(numbers) != 4:
                raise Refused("broken annotation", f"category {phrase!r}, bbox {numbers!r:.80}")
            x, y, w, h = numbers
            found.append(GroundedBox(phrase, (x, y, x + w, y + h)))
        notes = {"crowd regions left out (a box of many things)": crowds} if crowds else {}
        if not found:
            raise Refused("picture without annotations", "all its regions are crowds")
        try:
            turns = {"grounding": self._to_box(found, size), "referring": self._to_phrase(found, size)}
        except (GroundingError, TypeError) as error:
            raise Refused("box that cannot be written", str(error)) from None
        wanted = {"both": ("grounding", "referring"), "to-box": ("grounding",), "to-phrase": ("referring",)}[self.asked.directions]
        for i, task in enumerate(wanted):
            messages = [m for question, answer in turns[task] for m in _turn(question, answer)]
            messages[0]["content"] = f"{IMAGE_TOKEN}\n{messages[0]['content']}"
            yield Draft(check_messages(messages, 1), [picture], task=task, meta=meta, notes=notes if i == 0 else {})

    def _to_box(self, found: list[GroundedBox], size: tuple[int, int]) -> list[tuple[str, str]]:
        """A turn a category, in order of its first box; the answer holds all its boxes."""
        by_phrase: dict[str | None, list[GroundedBox]] = {}
        for box in found:
            by_phrase.setdefault(box.phrase, []).append(box)
        return [(f"Where is: {p}?", format_boxes(same, *size, self.notation)) for p, same in by_phrase.items()]

    def _to_phrase(self, found: list[GroundedBox], size: tuple[int, int]) -> list[tuple[str, str]]:
        """A turn a box."""
        return [(f"What is at {format_box(b.box_px, *size, self.notation)}?", str(b.phrase)) for b in found]


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
