"""Plain-text tables for --dry-run and logs."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> str:
    """Aligned columns: the first to the left, all others to the right (they hold numbers).

    Every row must be as long as the header; an assertion says otherwise, since rows come from our own code.
    """
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    assert all(len(row) == len(header) for row in cells), "a row's length differs from the header's"
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]

    def line(row: list[str]) -> str:
        first, *rest = (cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        return "  ".join((first, *rest)).rstrip()

    body = [line(cells[0]), "  ".join("-" * width for width in widths), *(line(row) for row in cells[1:])]
    return "\n".join(([title] if title else []) + body)


def human_count(number: float) -> str:
    """`12.3M`-style rendering of a count (powers of 1000)."""
    return _human(number, 1000.0, ("", "K", "M", "G", "T", "P", "E"))


def human_bytes(number: float) -> str:
    """`12.3 GiB`-style rendering of a size in bytes (powers of 1024)."""
    return _human(number, 1024.0, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _human(number: float, base: float, units: tuple[str, ...]) -> str:
    """The largest unit that leaves a number of at least 1."""
    power = 0
    while abs(number) >= base and power < len(units) - 1:
        number, power = number / base, power + 1
    return f"{number:.0f}{units[power]}" if power == 0 else f"{number:.2f}{units[power]}"
