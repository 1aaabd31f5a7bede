"""All that the doctor found, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from megavlm.cli._doctor.check import Check
from megavlm.cli._doctor.parts import Finding, machine

if TYPE_CHECKING:
    from megavlm.data.decode import DecoderReport

TAKEN = "auto takes this one"
_COLOURS = {"ok": "green", "note": "yellow", "missing": "yellow", "broken": "red", "not tried": "dim"}


@dataclass
class Report:
    """Everything that was looked at."""

    parts: list[Finding] = field(default_factory=list)
    decoders: list[DecoderReport] = field(default_factory=list)
    attention: dict[str, str] = field(default_factory=dict)
    """Backend of precision.attention -> why it cannot be taken here, TAKEN or "" when it can; for bf16 and heads of 128."""
    context: dict[str, str] = field(default_factory=dict)
    """Way of parallel.context_comm -> the same; for two ranks, plain bf16 layers of 32 and 8 heads and context_split=zigzag."""
    precision: dict[str, str] = field(default_factory=dict)
    """Number format -> through what this machine computes it, or "not here: " and why."""
    checks: list[Check] = field(default_factory=list)
    recipe: list[Check] | None = None

    @property
    def problems(self) -> list[str]:
        """Names of what is needed and cannot be used."""
        parts = [f.name for f in self.parts if f.required and f.status != "ok"]
        return parts + [c.name for c in (*self.checks, *(self.recipe or ())) if c.is_problem]

    def as_json(self) -> dict[str, Any]:
        """The whole as plain values."""
        return {
            "machine": machine(),
            "parts": [asdict(f) for f in self.parts],
            "decoders": [d._asdict() for d in self.decoders],
            "attention": self.attention,
            "context": self.context,
            "precision": self.precision,
            "checks": [asdict(c) for c in self.checks],
            "recipe": None if self.recipe is None else [asdict(c) for c in self.recipe],
            "problems": self.problems,
        }

    def print(self) -> None:
        """Readable, on standard output."""
        from rich.console import Console
        from rich.markup import escape

        console, here = Console(), machine()
        memory = "" if here["memory_gib"] == "unknown" else f", {here['memory_gib']} GiB of memory"
        console.print(f"Python {here['python']} on {here['system']}: {here['cores']} cores{memory}", highlight=False)
        rows = [(f.name, _of_part(f), f.version, _remarks(f.detail, f.without, f.required, f.status != "ok")) for f in self.parts]
        self._table(console, ("part", "", "version", "remarks"), rows)
        usable = [(d.name, "[green]ok[/]" if d.usable else "[yellow]not here[/]", escape(d.remark)) for d in self.decoders]
        self._table(console, ("picture decoder", "", "remarks"), usable)
        for title, conditions, ways in (
            ("attention", "bf16, heads of 128", self.attention),
            ("keys of context ranks", "bf16, context_split=zigzag", self.context),
        ):
            ways_here = [(w, "[green]ok[/]" if r in ("", TAKEN) else "[yellow]not here[/]", escape(r)) for w, r in ways.items()]
            self._table(console, (title, "", f"remarks ({conditions})"), ways_here)
        formats = [
            (
                name,
                "[yellow]not here[/]" if through.startswith("not here: ") else "[green]ok[/]",
                escape(through.removeprefix("not here: ")),
            )
            for name, through in self.precision.items()
        ]
        self._table(console, ("precision", "", "through"), formats)
        self._table(console, ("surroundings", "", "remarks"), [_of_check(c) for c in self.checks])
        if self.recipe is not None:
            self._table(console, ("recipe", "", "takes here"), [_of_check(c) for c in self.recipe])
        if self.problems:
            lacking = [f for f in self.parts if f.required and f.status != "ok"]
            console.print(f"[red]Needed and not usable: {', '.join(self.problems)}.[/]", highlight=False)
            if lacking:
                console.print("Install megavlm again with `make install`.")

    @staticmethod
    def _table(console: Any, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich.table import Table

        table = Table(*header, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def _of_part(finding: Finding) -> str:
    colour = {"ok": "green", "missing": "red" if finding.required else "yellow", "broken": "red"}[finding.status]
    return f"[{colour}]{finding.status}[/]"


def _of_check(check: Check) -> tuple[str, str, str]:
    colour = "red" if check.is_problem else _COLOURS[check.state]
    told = check.state in ("missing", "broken", "note")
    return check.name, f"[{colour}]{check.state}[/]", _remarks(check.detail, check.without, check.is_problem, told)


def _remarks(detail: str, without: str, needed: bool, told: bool) -> str:
    from rich.markup import escape

    lost = [("needed: " if needed else "") + without] if told and without else []
    return escape("; ".join([*([detail] if detail else []), *lost]))
