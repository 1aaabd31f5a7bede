"""Questions and answers about pictures: VQAv2's question and annotation files, and plain records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from megavlm.data.prepare.conversations import as_list, check_messages
from megavlm.data.prepare.files import PictureFinder, parent, suffix
from megavlm.data.prepare.jsonstream import JsonStream
from megavlm.data.prepare.records import identity, read_record, record_entries, text_field
from megavlm.data.prepare.types import Draft, Entry, Format, Picture, PrepareError, PrepareOptions, Refused
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.storage import as_path, open_read, stamp


def common_answer(answers: list[str]) -> str:
    """The most frequent answer; among equals the one that comes first."""
    counts = Counter(answers)
    return max(counts, key=lambda a: (counts[a], -answers.index(a)))


class Vqa(Format):
    """One question a sample, or one (question, answer) with answers=all, weighted by how many gave the answer."""

    name = "vqa"
    help = "Questions and answers: VQAv2 questions (with --annotations), or records (question, answers or answer, image)."
    default_task = "vqa"
    options = frozenset({"columns", "prompt", "annotations", "answers", "image_pattern"})
    fields = ("id", "question", "answers", "answer", "image", "images")

    def __init__(self, asked: PrepareOptions) -> None:
        super().__init__(asked)
        self.pictures = PictureFinder(asked.images or parent(asked.input))
        if "{question}" not in self._prompt:
            raise PrepareError(f'--prompt {asked.prompt!r} must say where the question stands, as in "{{question}} Answer briefly."')

    @property
    def _prompt(self) -> str:
        return "{question}" if self.asked.prompt is None else self.asked.prompt

    def entries(self) -> Iterator[tuple[Entry, float]]:
        if suffix(self.asked.input) == "json":
            with open_read(as_path(self.asked.input)) as file:
                stream = JsonStream(file, self.asked.input)
                if stream.peek() == "{":
                    yield from self._vqav2(stream, stamp(self.asked.input).size_bytes)
                    return
        if self.asked.annotations or self.asked.image_pattern:
            raise PrepareError("--annotations and --image-pattern go with a VQAv2 question file, a JSON object with questions")
        yield from record_entries(self.asked.input)

    def _vqav2(self, stream: JsonStream, size: int) -> Iterator[tuple[Entry, float]]:
        if not self.asked.annotations:
            raise PrepareError(f"{self.asked.input} is a question file in the manner of VQAv2: name its answers with --annotations")
        answers, subtype = _annotations(self.asked.annotations)
        found = False
        for key in stream.object():
            if key == "data_subtype":
                subtype = str(stream.value())
            elif key == "questions":
                found = True
                for question in stream.array():
                    number = question.get("question_id") if isinstance(question, dict) else None
                    where = f"{self.asked.input}: question {number!r}"
                    yield (
                        Entry(where, ("vqav2", question, answers.get(number) if isinstance(number, int | str) else None, subtype)),
                        stream.num_bytes / max(1, size),
                    )
            else:
                stream.skip()
        if not found:
            raise PrepareError(f"{self.asked.input}: a JSON object without questions")

    def convert(self, entry: Entry) -> Iterator[Draft | Refused]:
        if entry.payload[0] == "vqav2":
            record = self._joined(*entry.payload[1:])
        else:
            raw = read_record(entry)
            names = ("id", "question", "answers", "answer", "image", "images")
            record = {n: raw[self.column(n)] for n in names if self.column(n) in raw}
        question = text_field(record, "question", "question").strip()
        answers = _answers(record)
        addresses = [*as_list(record.get("image")), *as_list(record.get("images"))]
        pictures = [Picture(self.pictures.load(a)) for a in addresses]
        text = IMAGE_TOKEN * len(pictures) + "\n" * bool(pictures) + self._prompt.replace("{question}", question)
        kept = Counter({common_answer(answers): 1}) if self.asked.answers == "common" else Counter(answers)
        for answer, count in kept.items():
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            weight = count / kept.total()
            yield Draft(check_messages(messages, len(pictures)), pictures, weight=weight, meta=identity(record, "id"))

    def _joined(self, question: Any, answers: list[str] | None, subtype: str) -> dict[str, Any]:
        if not isinstance(question, dict) or "image_id" not in question:
            raise Refused("question without picture", f"{question!r:.100} names no image_id")
        if answers is None:
            raise Refused("question without annotation", f"{self.asked.annotations} has no question {question.get('question_id')!r}")
        pattern = self.asked.image_pattern or f"COCO_{subtype}_{{image_id:012d}}.jpg"
        try:
            name = pattern.format(**question)
        except (KeyError, ValueError, IndexError, TypeError, AttributeError) as error:
            raise Refused("picture without address", f"--image-pattern {pattern!r} does not fit {question!r:.100}: {error}") from None
        return {"id": question.get("question_id"), "question": question.get("question"), "answers": answers, "image": name}


def _annotations(path: str) -> tuple[dict[Any, list[str]], str]:
    """Answers by question, and the pictures' subtype ("train2014"). The answers of all questions are held in memory ."""
    answers: dict[Any, list[str]] = {}
    subtype = ""
    shared: dict[str, str] = {}
    with open_read(as_path(path)) as file:
        stream = JsonStream(file, path)
        for key in stream.object():
            if key == "data_subtype":
                subtype = str(stream.value())
            elif key == "annotations":
                for item in stream.array():
                    number = item.get("question_id") if isinstance(item, dict) else None
                    if not isinstance(number, int | str):  # its question is refused, as one without annotation
                        continue
                    texts = [a.get("answer") if isinstance(a, dict) else a for a in as_list(item.get("answers"))]
                    texts = texts or [item.get("multiple_choice_answer")]
                    answers[number] = [shared.setdefault(t, t) for t in texts if isinstance(t, str)]
            else:
                stream.skip()
    if not answers:
        raise PrepareError(f"{path}: a JSON object without annotations")
    return answers, subtype


def _answers(record: dict[str, Any]) -> list[str]:
    values = as_list(record.get("answers")) or as_list(record.get("answer"))
    texts = [v.get("answer") if isinstance(v, dict) else v for v in values]
    kept = [str(t).strip() for t in texts if isinstance(t, str | int | float) and not isinstance(t, bool)]
    kept = [t for t in kept if t]
    if not kept:
        raise Refused("empty answer" if values else "no answer", f"neither answers nor answer holds a text ({values!r:.80})")
    return kept
