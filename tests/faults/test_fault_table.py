"""The table of docs/reliability.md, and the list of faults that it is made from."""

from __future__ import annotations

from pathlib import Path

from megavlm.testing.matrix.faults import DAMAGES, FAULTS
from megavlm.testing.matrix.table import BEGIN, END, write

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_the_table_goes_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    killed = {"what": "rank 1 killed", "code": 137, "detect_s": 1.25, "resume_s": 9.0, "lost": 3, "loss": "bit-exact"}
    write({"kill": killed, "flip": {"what": "a bit flipped", "resume_s": 8.04, "lost": 4, "loss": "bit-exact"}}, page)
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", BEGIN] and lines[-2:] == [END, "after"] and "old" not in lines
    assert lines[4:6] == ["| rank 1 killed | 137 | 1.2 s | 9.0 s | 3 | bit-exact |", "| a bit flipped |  |  | 8.0 s | 4 | bit-exact |"]


def test_the_page_has_the_marks_once() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)


def test_every_fault_is_told_apart() -> None:
    names = [*(fault.name for fault in FAULTS), *(damage.name for damage in DAMAGES)]
    assert len(names) == len(set(names))
    assert {*(fault.name for fault in FAULTS if fault.quick), *(damage.name for damage in DAMAGES if damage.quick)} == {
        "kill -9 of rank 1",
        "flipped bit",
    }
