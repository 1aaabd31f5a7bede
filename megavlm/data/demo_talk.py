"""What is said about the demonstration's pages, and text-only conversations in the same language.

The text-only half holds "layouts": a page told in words, cell by cell ("- - four four - two"), with the very questions that are asked
about pictures. A language model pretrained on them knows how to look something up on a page before it has seen one;
what is left for the alignment stage is to map the encoder's patches to those words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megavlm.data.demo_pages import Page, PageMaker

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
BLANK = "-"
CELL_PX = 8
"""Side of a layout's cell: the quickstart encoder's patch, so that a layout is as long as a picture."""
READ = "Which number is written here?"
COUNT = "How many digits are on the page?"
CAPTION = "Describe the page."
WHERE = "Where is the number?"
MAX_SCATTERED = 5
IMAGE = "<image>\n"


@dataclass
class Talk:
    """One sample before it is written: what is said, about which pages."""

    task: str
    turns: list[tuple[str, str]]
    """(user, assistant) in order."""
    pages: list[Page] = field(default_factory=list)
    answer: Any = None
    """What a scorer compares with: a string, or four integers 0-999 for grounding."""

    def messages(self) -> list[dict[str, str]]:
        """The conversation in the shard format."""
        return [{"role": role, "content": text} for turn in self.turns for role, text in zip(("user", "assistant"), turn, strict=True)]


# ------------------------------------------------------------------------------------------ what can be said of a page


def number_of(page: Page) -> str:
    """The number that a row of digits spells."""
    return "".join(str(d.digit) for d in page.digits)


def caption_of(page: Page) -> str:
    """How many digits there are and which, in ascending order (strewn digits have no other)."""
    plural = "" if len(page.digits) == 1 else "s"
    return f"{len(page.digits)} digit{plural}: " + " ".join(str(d) for d in sorted(d.digit for d in page.digits))


def box_text(box: tuple[int, int, int, int]) -> str:
    """A box as text: x0 y0 x1 y1, three figures each, 0-999."""
    return " ".join(f"{v:03d}" for v in box)


def place_of(page: Page, page_px: int) -> tuple[int, int, int, int]:
    """The box round all digits of a page: x0 y0 x1 y1, 0-999."""
    boxes = np.array([d.box_per_mille(page_px) for d in page.digits])
    x0, y0, x1, y1 = (int(v) for v in (*boxes[:, :2].min(axis=0), *boxes[:, 2:].max(axis=0)))
    return x0, y0, x1, y1


def layout_of(page: Page, page_px: int) -> str:
    """The page in words, cell by cell, row by row: a digit's name where its box covers the cell's centre, else a blank."""
    side = page_px // CELL_PX
    cells = np.full((side, side), BLANK, dtype=object)
    for placed in page.digits:
        # A cell's centre lies at (i + 1/2) * CELL_PX; the box holds it when x0 <= centre < x1.
        x0, y0, x1, y1 = (int(np.ceil(v / CELL_PX - 0.5)) for v in placed.box_px)
        cells[y0:y1, x0:x1] = WORDS[placed.digit]
    return " ".join(cells.ravel())


# ------------------------------------------------------------------------------------------------------------ pictures


class Talker:
    """Draws conversations from one generator. The answers' distributions are uniform by construction (see `CHANCE`)."""

    def __init__(self, maker: PageMaker, rng: np.random.Generator) -> None:
        self.maker = maker
        self.rng = rng

    def digits(self, low: int, high: int) -> list[int]:
        """Between `low` and `high` digits (both included), uniformly."""
        return [int(d) for d in self.rng.integers(0, 10, size=int(self.rng.integers(low, high + 1)))]

    def row(self) -> Page:
        return self.maker.row(self.digits(1, 3), self.rng)

    def strewn(self) -> Page:
        return self.maker.scattered(self.digits(1, MAX_SCATTERED), self.rng)

    def reading(self) -> Talk:
        page = self.row()
        return Talk("reading", [(IMAGE + READ, number_of(page))], [page], number_of(page))

    def counting(self) -> Talk:
        page = self.strewn()
        return Talk("counting", [(IMAGE + COUNT, str(len(page.digits)))], [page], str(len(page.digits)))

    def caption(self) -> Talk:
        page = self.strewn()
        return Talk("caption", [(IMAGE + CAPTION, caption_of(page))], [page], caption_of(page))

    def grounding(self) -> Talk:
        page = self.row()
        box = place_of(page, self.maker.page_px)
        return Talk("grounding", [(IMAGE + WHERE, box_text(box))], [page], list(box))

    def turns(self) -> Talk:
        """Several questions about one page."""
        page = self.row()
        turns = [(COUNT, str(len(page.digits))), (READ, number_of(page)), (WHERE, box_text(place_of(page, self.maker.page_px)))]
        chosen = [turns[i] for i in self.rng.permutation(3)]
        chosen[0] = (IMAGE + chosen[0][0], chosen[0][1])
        return Talk("turns", chosen, [page], [answer for _, answer in chosen])

    def several(self) -> Talk:
        """Two or three pages, one of which is asked for."""
        pages = [self.row() for _ in range(int(self.rng.integers(2, 4)))]
        which = int(self.rng.integers(len(pages)))
        question = f"Which number is written on page {which + 1}?"
        return Talk("several", [(IMAGE * len(pages) + question, number_of(pages[which]))], pages, number_of(pages[which]))

    def crowd(self) -> Page:
        """A full page: many labelled digits a picture, to pretrain the encoder on."""
        return self.maker.crowded(self.rng)


# ----------------------------------------------------------------------------------------------------------- text only


class TextTalker:
    """Text-only conversations: layouts, and small exercises on numbers and their names."""

    def __init__(self, talker: Talker) -> None:
        self.talker = talker
        self.rng = talker.rng
        self._kinds: list[tuple[float, Callable[[], Talk]]] = [
            (0.8, self.layout),
            (0.05, self.spelling),
            (0.05, self.ordering),
            (0.05, self.arithmetic),
            (0.05, self.length),
        ]

    def any(self) -> Talk:
        """A conversation of a random kind."""
        shares = [share for share, _ in self._kinds]
        return self._kinds[int(self.rng.choice(len(shares), p=shares))][1]()

    def layout(self) -> Talk:
        """A question about a page that is told instead of shown."""
        talker = self.talker
        talk = (talker.reading, talker.counting, talker.caption, talker.grounding)[int(self.rng.integers(4))]()
        question, answer = talk.turns[0]
        told = layout_of(talk.pages[0], talker.maker.page_px)
        return Talk("layout", [(f"{told}\n{question.removeprefix(IMAGE)}", answer)], [], talk.answer)

    def spelling(self) -> Talk:
        """A number's name, or the number of a name."""
        digits = self.talker.digits(1, 3)
        number, name = "".join(map(str, digits)), " ".join(WORDS[d] for d in digits)
        if self.rng.random() < 0.5:
            return Talk("spelling", [(f"Write {number} in words.", name)], [], name)
        return Talk("spelling", [(f"Write {name} in figures.", number)], [], number)

    def ordering(self) -> Talk:
        """Digits to be put into ascending order."""
        digits = self.talker.digits(2, MAX_SCATTERED)
        answer = " ".join(map(str, sorted(digits)))
        return Talk("ordering", [("Sort " + " ".join(WORDS[d] for d in digits) + ".", answer)], [], answer)

    def arithmetic(self) -> Talk:
        """A sum of two digits."""
        a, b = (int(v) for v in self.rng.integers(0, 10, size=2))
        return Talk("arithmetic", [(f"What is {a} + {b}?", str(a + b))], [], str(a + b))

    def length(self) -> Talk:
        """How many digits a list has."""
        digits = self.talker.digits(1, MAX_SCATTERED)
        return Talk(
            "length", [("How many digits are in " + " ".join(WORDS[d] for d in digits) + "?", str(len(digits)))], [], str(len(digits))
        )


CHANCE = {
    "reading": (1 / 10 + 1 / 100 + 1 / 1000) / 9,
    "counting": 1 / MAX_SCATTERED,
}
"""Probability that the answer about one page is also right for another, independent page. Reading: 1 to 3 digits with equal
probability, each digit uniform: sum over lengths of (1/3)^2 * 10^-length. Counting: uniform over 1 to MAX_SCATTERED."""
