"""What an evaluation found: every answer, and the table over tasks and conditions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RIGHT, SWAPPED, NONE = "right picture", "swapped picture", "no picture"
CONDITIONS = (RIGHT, SWAPPED, NONE)


@dataclass(frozen=True)
class Answer:
    """One answer of the model under one condition."""

    number: int
    """Of the question in the evaluation."""
    source: str
    key: str
    task: str
    condition: str
    question: str
    reference: str
    prediction: str
    right: bool
    """Right for the question's own reference."""
    ended: bool
    """False: cut at the length limit."""
    partner: str | None = None
    """Swapped picture: key of the sample whose pictures were shown."""
    follows: bool | None = None
    """Swapped picture: right for the picture that was shown; None where the partner asks something else."""


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    count: int
    total: int

    @property
    def value(self) -> float | None:
        """0 to 1; None of nothing."""
        return self.count / self.total if self.total else None

    def __str__(self) -> str:
        return "-" if self.value is None else f"{100 * self.value:.1f} %"


@dataclass(frozen=True)
class TaskResult:
    """One row of the table."""

    task: str
    metric: str
    samples: int
    right_picture: Share
    swapped_picture: Share
    """Still right although another sample's picture was shown, one with another answer: a model that looks has 0 here."""
    chance: float | None
    """How often another sample's answer would be right anyway: what a picture that is ignored, or unrelated, would give."""
    follows_swapped: Share
    """Answered what the swapped picture shows (counted where its sample asks the same question)."""
    no_picture: Share


@dataclass(frozen=True)
class EvaluationResult:
    """`tasks` is the table, `answers` everything it was counted from."""

    split: str
    tasks: tuple[TaskResult, ...]
    answers: tuple[Answer, ...]

    def task(self, name: str) -> TaskResult:
        """Row of one task. Raises KeyError when it was not measured."""
        for row in self.tasks:
            if row.task == name:
                return row
        raise KeyError(f"task {name!r} was not measured; measured: {', '.join(t.task for t in self.tasks)}")

    def table(self) -> str:
        """The table as aligned text."""
        head = ("task", "right means", "samples", RIGHT, SWAPPED, "chance", "follows swapped", NONE)
        rows = [
            (
                t.task,
                t.metric,
                str(t.samples),
                str(t.right_picture),
                str(t.swapped_picture),
                "-" if t.chance is None else f"{100 * t.chance:.1f} %",
                str(t.follows_swapped),
                str(t.no_picture),
            )
            for t in self.tasks
        ]
        return aligned([head, *rows])

    def to_json(self) -> dict[str, object]:
        """The table as plain values; shares as {count, total, value}."""
        tasks = []
        for row in self.tasks:
            values = asdict(row)
            for name in ("right_picture", "swapped_picture", "follows_swapped", "no_picture"):
                values[name]["value"] = getattr(row, name).value
            tasks.append(values)
        return {"split": self.split, "tasks": tasks}

    def write(self, folder: str | Path) -> None:
        """evaluation.json (the table) and predictions.jsonl (a line an answer) in `folder`, created when missing."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        lines = [json.dumps(asdict(a), ensure_ascii=False) for a in self.answers]
        (folder / "predictions.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Text columns: the first two to the left, the others to the right; a rule under the first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))) for row in rows]
    return "\n".join([lines[0].rstrip(), "-" * len(lines[0]), *(line.rstrip() for line in lines[1:])])
