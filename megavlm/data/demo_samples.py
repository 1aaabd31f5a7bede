"""One sample of the demonstration data, from its name: what the worker processes run.

Free of torch, so that a worker starts in a second.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from megavlm.data.demo_pages import PageMaker
from megavlm.data.demo_talk import Talk, Talker, TextTalker

SOURCES = ("pages", "multi", "text", "patches")
SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class SampleName:
    """Which sample of which source and split."""

    source: str
    split: str
    number: int


def plan_samples(num_train: int, num_held_out: int) -> list[SampleName]:
    """Names of all samples: `num_train` and `num_held_out` of pages, half as many of multi and text, as many of patches."""
    return [
        SampleName(source, split, i)
        for source in SOURCES
        for split, base in zip(SPLITS, (num_train, num_held_out), strict=True)
        for i in range(base if source in ("pages", "patches") else base // 2)
    ]


@cache
def _maker(split: str, page_px: int) -> PageMaker:
    return PageMaker(split, page_px)


def _talk(name: SampleName, seed: int, page_px: int) -> Talk:
    """The sample of that name, from a generator that nothing else draws from."""
    rng = np.random.default_rng((seed, SOURCES.index(name.source), SPLITS.index(name.split), name.number))
    talker = Talker(_maker(name.split, page_px), rng)
    if name.source == "pages":
        return (talker.caption, talker.reading, talker.counting, talker.grounding)[name.number % 4]()
    if name.source == "multi":
        return (talker.turns, talker.several)[name.number % 2]()
    if name.source == "text":
        return TextTalker(talker).any()
    page = talker.crowd()
    return Talk("patches", [], [page])


def make_sample(name: SampleName, seed: int, page_px: int) -> tuple[dict[str, Any], list[bytes]]:
    """JSON and pictures of one sample."""
    talk = _talk(name, seed, page_px)
    sample: dict[str, Any] = {"task": talk.task, "split": name.split, "messages": talk.messages()}
    if talk.pages:
        sample["objects"] = [
            {"image": i, "label": placed.digit, "box_px": list(placed.box_px)}
            for i, page in enumerate(talk.pages)
            for placed in page.digits
        ]
    if talk.answer is not None:
        sample["meta"] = {"answer": talk.answer}
    return sample, [page.png() for page in talk.pages]
