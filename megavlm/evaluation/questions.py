"""Held-out questions with their right answers, and for each a partner whose pictures can be shown in its place."""

from __future__ import annotations

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megavlm.config.schema import DataConfig, ModelConfig, SourceConfig
from megavlm.data.index import SampleIndex, build_index
from megavlm.data.sample import IMAGE_TOKEN
from megavlm.data.shards import Sample
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.boxes import Box, box_iou, is_box_text, parse_box

RIGHT_IOU = 0.5
"""A predicted box is right from this intersection over union on."""


class EvaluationError(ValueError):
    """What was asked to be measured cannot be."""


@dataclass(frozen=True)
class Question:
    """The conversation up to the assistant's first message, which is the reference.

    Later turns are left out: their history would tell the model right answers whatever picture it is shown.
    """

    source: str
    row: int
    key: str
    task: str
    messages: tuple[dict[str, str], ...]
    num_pictures: int
    reference: str
    box: Box | None
    """The reference as a box: then a prediction is right by its overlap; None: by being the same text."""
    index: SampleIndex = field(repr=False, compare=False)

    @property
    def text(self) -> str:
        """What the user asks, pictures aside."""
        return without_pictures(self.messages)[-1]["content"]

    def pictures(self) -> list[bytes]:
        """Encoded pictures that the messages show, in order."""
        return [self.index.image(self.row, i) for i in range(self.num_pictures)]

    def accepts(self, prediction: str) -> bool:
        """Whether a prediction is right: IoU of at least RIGHT_IOU for boxes, else the same text (outer spaces aside)."""
        if self.box is None:
            return prediction.strip() == self.reference.strip()
        predicted = parse_box(prediction)
        return predicted is not None and box_iou(predicted, self.box) >= RIGHT_IOU


def without_pictures(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """The same messages with every "<image>" (and the line break after it) taken out."""
    return [{**m, "content": m["content"].replace(f"{IMAGE_TOKEN}\n", "").replace(IMAGE_TOKEN, "")} for m in messages]


def load_questions(
    sources: Mapping[str, SourceConfig],
    data: DataConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str] | None,
    per_task: int,
    seed: int,
    progress: bool = False,
) -> list[Question]:
    """Up to `per_task` questions of each task, chosen by `seed`, in order of task; the same on every rank.

    Raises:
        EvaluationError: no source, a task that no source has, a sample without an assistant message, or a grounding reference
            that is not a box.
        SampleIndexError: as `build_index`.
    """
    if not sources:
        raise EvaluationError("no data to measure on: name data sources (evaluation.sources of the recipe, or --source, or --data FOLDER)")
    indexes = {name: build_index(source, data, model, "multimodal", tokenizer, progress) for name, source in sources.items()}
    rows: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for name in sorted(indexes):
        for row in range(len(indexes[name])):
            rows[indexes[name].task(row)].append((name, row))
    missing = sorted(set(tasks or ()) - set(rows))
    if missing:
        raise EvaluationError(
            f"no sample of task {', '.join(missing)} in {', '.join(sorted(sources))}; there are {', '.join(sorted(rows))}"
        )
    questions = []
    for task in sorted(tasks or rows):
        generator = np.random.default_rng([seed, zlib.crc32(task.encode())])
        chosen = np.sort(generator.permutation(len(rows[task]))[:per_task])
        questions += [_question(rows[task][i][0], rows[task][i][1], indexes[rows[task][i][0]]) for i in chosen]
    return questions


def _question(source: str, row: int, index: SampleIndex) -> Question:
    sample = index.sample(row)
    first = next((i for i, m in enumerate(sample.messages) if m.role == "assistant"), 0)
    if first == 0:
        raise EvaluationError(f"{index.where(row)}: no assistant message after a user's: there is nothing to compare an answer with")
    messages = tuple(m.model_dump() for m in sample.messages[:first])
    reference = sample.messages[first].content
    return Question(
        source=source,
        row=row,
        key=index.key(row),
        task=sample.task,
        messages=messages,
        num_pictures=sum(m["content"].count(IMAGE_TOKEN) for m in messages),
        reference=reference,
        box=_reference_box(sample, reference, index.where(row)),
        index=index,
    )


def _reference_box(sample: Sample, reference: str, where: str) -> Box | None:
    if sample.task == "grounding":
        box = parse_box(reference)
        if box is None:
            raise EvaluationError(f"{where}: a grounding answer must be a box (four integers 0-999, x0 < x1, y0 < y1), not {reference!r}")
        return box
    return parse_box(reference) if is_box_text(reference) else None


def swap_partners(questions: Sequence[Question], seed: int) -> list[int | None]:
    """For each question another one whose pictures make its own reference wrong; one that asks the same where there is one.

    None for questions without pictures and where every other sample has the same answer.
    """
    partners: list[int | None] = []
    for mine, pools in zip(questions, _lenders(questions), strict=True):
        differing = ([j for j in pool if not mine.accepts(questions[j].reference)] for pool in pools)
        candidates = next((pool for pool in differing if pool), [])
        draw = zlib.crc32(f"{seed}/{mine.source}/{mine.key}".encode())
        partners.append(candidates[draw % len(candidates)] if candidates else None)
    return partners


def chance(questions: Sequence[Question]) -> float | None:
    """How often another sample's answer is right: what looking at an unrelated picture gives.

    Mean over the questions of the share of other samples, those that ask the same where there are any, whose reference would be
    accepted. None without such samples.
    """
    shares = []
    for mine, pools in zip(questions, _lenders(questions), strict=True):
        nearest = next((pool for pool in pools if pool), [])
        if nearest:
            shares.append(sum(_agree(mine, questions[j]) for j in nearest) / len(nearest))
    return sum(shares) / len(shares) if shares else None


def _agree(mine: Question, other: Question) -> bool:
    """`mine.accepts(other.reference)`, without reading the text of a box again."""
    if mine.box is not None and other.box is not None:
        return box_iou(mine.box, other.box) >= RIGHT_IOU
    return mine.accepts(other.reference)


def _lenders(questions: Sequence[Question]) -> Iterator[list[list[int]]]:
    """For each question the numbers of those that can lend it their pictures, in pools, nearest first.

    All have the same task and as many pictures (at least one). First those with the same question; then those whose question differs
    in its numbers only ("Where is the 3?"); then all.
    """
    pools: dict[tuple[str, int, str], list[int]] = defaultdict(list)
    for i, question in enumerate(questions):
        for key in _pool_keys(question):
            pools[key].append(i)
    for i, question in enumerate(questions):
        yield [[j for j in pools[key] if j != i] for key in _pool_keys(question)]


def _pool_keys(question: Question) -> list[tuple[str, int, str]]:
    if not question.num_pictures:
        return []
    return [(question.task, question.num_pictures, text) for text in (question.text, re.sub(r"\d+", "0", question.text) + " ~", "*")]
