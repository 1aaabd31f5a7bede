"""COCO annotation files: captions, and instances as grounding in both directions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megavlm.data.grounding import NOTATIONS, GroundedBox, GroundingError, format_box, format_boxes
from megavlm.data.images import ImageError, measure_image
from megavlm.data.prepare.captions import captioned
from megavlm.data.prepare.conversations import check_messages
from megavlm.data.prepare.files import PictureFinder, parent
from megavlm.data.prepare.jsonstream import JsonStream
from megavlm.data.prepare.types import NUM_EXAMPLES, Draft, Entry, Format, Picture, PrepareError, PrepareOptions, Refused, left_out
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.storage import as_path, open_read

_Id = int | str
_MAX_PX = 1e9
"""NaN, infinities and numbers of hundreds of digits are no pixels."""
_PIXEL_NOTATIONS = ("qwen2.5-vl",)
"""Their numbers are pixels of the picture as a recipe resizes it, which no one knows here."""


@dataclass
class _Found:
    """What is kept of a file."""

    images: dict[_Id, tuple[Any, Any, Any]] = field(default_factory=dict)
    """File name, width, height."""
    ambiguous: dict[_Id, str] = field(default_factory=dict)
    """Ids of different pictures."""
    categories: dict[_Id, str] = field(default_factory=dict)
    captions: dict[_Id, list[str]] = field(default_factory=lambda: defaultdict(list))
    boxes: dict[_Id, list[Any]] = field(default_factory=lambda: defaultdict(list))
    broken: list[tuple[str, str, str]] = field(default_factory=list)
    """Place, reason and detail."""
    passed: dict[str, tuple[int, list[str]]] = field(default_factory=dict)
    """Count and first examples by note."""

    def take(self, key: str, item: Any, place: str) -> None:
        """One element of one of the three lists."""
        names = {"images": ("id",), "categories": ("id",), "annotations": ("image_id",)}[key]
        if not isinstance(item, dict):
            self.broken.append((place, "entry that is no object", f"{item!r:.80}"))
        elif wrong := [n for n in names if isinstance(item.get(n), bool) or not isinstance(item.get(n), int | str)]:
            self.broken.append((place, "entry without id", f"its {wrong[0]} is {item.get(wrong[0])!r:.80}, and a number or text is wanted"))
        elif key == "images":
            self._image(item, place)
        elif key == "categories":
            if isinstance(item.get("name"), str):
                self.categories[item["id"]] = item["name"]
            else:
                self.broken.append((place, "category without name", f"{item!r:.80}"))
        else:
            self._annotation(item, place)

    def _image(self, item: dict[str, Any], place: str) -> None:
        number, values = item["id"], (item.get("file_name"), item.get("width"), item.get("height"))
        before = self.images.setdefault(number, values)
        if before != values:
            self.ambiguous[number] = f"{before} and {values}"
        elif before is not values:
            self._pass("images listed twice, in the same words", f"{place}: id {number!r}")

    def _annotation(self, item: dict[str, Any], place: str) -> None:
        number, category = item["image_id"], item.get("category_id")
        if isinstance(item.get("caption"), str):
            self.captions[number].append(item["caption"])
            if "bbox" in item:
                self._pass("boxes left out, of annotations that hold a caption too", f"{place}: image {number!r}")
        elif "bbox" in item:
            numbers = tuple(item["bbox"]) if isinstance(item["bbox"], list) else ()
            self.boxes[number].append((category if isinstance(category, int | str) else None, numbers, bool(item.get("iscrowd"))))
        else:
            self._pass("annotations left out, with neither caption nor bbox", f"{place}: image {number!r}")

    def _pass(self, note: str, example: str) -> None:
        count, examples = self.passed.get(note, (0, []))
        self.passed[note] = (count + 1, [*examples, example][:NUM_EXAMPLES])


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
        found = self._read()
        images, captions, boxes = found.images, found.captions, found.boxes
        if not (images or found.broken) or not (captions or boxes or found.broken):
            raise PrepareError(f"{self.asked.input}: not a COCO file with images and annotations (captions, or bbox and category_id)")
        if boxes and self.asked.prompt is not None:
            raise PrepareError("--prompt goes with captions; instances bring their questions")
        for number, (image_id, (name, width, height)) in enumerate(images.items()):
            where = f"{self.asked.input}: image {image_id!r}"
            if image_id in found.ambiguous:
                yield Entry(where, ("broken", "two pictures with one id", f"images lists {image_id!r} as {found.ambiguous[image_id]}")), 1.0
                captions.pop(image_id, None)
                boxes.pop(image_id, None)
                continue
            of_image = [(found.categories.get(c), box, crowd) for c, box, crowd in boxes.pop(image_id, [])]
            payload = ("coco", image_id, name, width, height, captions.pop(image_id, []), of_image)
            yield Entry(where, payload), (number + 1) / len(images)
        for image_id in dict.fromkeys([*captions, *boxes]):
            yield Entry(f"{self.asked.input}: image {image_id!r}", ("orphan", image_id)), 1.0
        for where, reason, detail in found.broken:
            yield Entry(f"{self.asked.input}: {where}", ("broken", reason, detail)), 1.0
        for note, (count, examples) in sorted(found.passed.items()):
            yield left_out(self.asked.input, note, examples, count), 1.0

    def _read(self) -> _Found:
        found = _Found()
        with open_read(as_path(self.asked.input)) as file:
            stream = JsonStream(file, self.asked.input)
            if stream.peek() != "{":
                raise PrepareError(f"{self.asked.input}: not a COCO file, which is a JSON object")
            for key in stream.object():
                if key in ("images", "categories", "annotations"):
                    if stream.peek() != "[":
                        raise PrepareError(f"{self.asked.input}: not a COCO file: {key} is not a list")
                    for number, item in enumerate(stream.array()):
                        found.take(key, item, f"{key}[{number}]")
                else:
                    stream.skip()
        return found

    def convert(self, entry: Entry) -> Iterator[Draft | Refused]:
        if entry.payload[0] == "orphan":
            raise Refused("annotations of an unknown picture", f"images does not list {entry.payload[1]!r}")
        if entry.payload[0] == "broken":
            raise Refused(*entry.payload[1:])
        _, image_id, name, width, height, captions, boxes = entry.payload
        if not captions and not boxes:
            raise Refused("picture without annotations", f"{name!r:.200}")
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
        found, crowds, empty = [], 0, 0
        for phrase, numbers, is_crowd in boxes:
            if is_crowd:
                crowds += 1
                continue
            if phrase is None or len(numbers) != 4 or not all(_is_number(n) for n in numbers):
                raise Refused("broken annotation", f"category {phrase!r}, bbox {numbers!r:.80}")
            x, y, w, h = numbers
            if w == 0 or h == 0:
                empty += 1
                continue
            found.append(GroundedBox(phrase, (x, y, x + w, y + h)))
        counts = {"crowd regions left out (a box of many things)": crowds, "boxes left out (of no area)": empty}
        notes = {note: count for note, count in counts.items() if count}
        if not found:
            raise Refused("picture without annotations", "all its regions are crowds or boxes of no area")
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_PX


def _turn(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
