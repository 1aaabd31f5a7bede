"""The table of docs/reliability.md, and the list of faults that it is made from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megavlm.testing.matrix.faults import DAMAGES, FAULTS
from megavlm.testing.matrix.table import BEGIN, END, RESULTS, collected, read, write

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"


def test_the_table_goes_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    killed = {"what": "rank 1 killed", "code": 137, "detect_s": 1.25, "resume_s": 9.0, "goal_s": 30.0, "lost": 3, "loss": "bit-exact"}
    slow = {**killed, "what": "a rank stopped", "detect_s": 51.0, "resume_s": 9.25, "goal_s": 60.0}
    flipped = {"what": "a bit flipped", "resume_s": 8.04, "lost": 4, "loss": "bit-exact"}
    rows = {"kill": killed, "stop": slow, "flip": flipped, "exploits": {"what": "9 files, none ran", "code": "0 or 2"}}
    write({"rows": rows, "began": 1000.5, "ended": 1321.5, "cores": 2, "load": 0.25, "date": "2026-01-02"}, page)
    lines = page.read_text().splitlines()
    assert lines[:2] == ["before", BEGIN] and lines[-2:] == [END, "after"] and "old" not in lines
    assert lines[4:] == [
        "| rank 1 killed | 137 | 1.2 s | 9.0 s | 10.2 s (30 s) | 3 | bit-exact |",
        "| a rank stopped | 137 | 51.0 s | 9.2 s | 60.2 s (60 s) | 3 | bit-exact |",
        "| a bit flipped |  |  | 8.0 s |  | 4 | bit-exact |",
        "| 9 files, none ran | 0 or 2 |  |  |  |  |  |",
        "",
        "- Goals missed: a rank stopped.",
        "- Measured on 2026-01-02 in 5.3 minutes in all, on 2 cores with a load of 0.2 when it began.",
        END,
        "after",
    ]


def test_what_several_processes_measured_is_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, last = DAMAGES[1].name, FAULTS[0].name, "SLURM, dead node"
    monkeypatch.setenv(RESULTS, str(tmp_path))
    for names in [(last, first), (second,)]:
        with collected() as rows:
            rows.update({name: {"what": name} for name in names})
    found = read(tmp_path)
    assert list(found["rows"].items()) == [(name, {"what": name}) for name in (second, first, last)]
    assert found["ended"] > found["began"] and found["cores"] == os.cpu_count()


def test_a_folder_without_results_is_told(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"{RESULTS}={tmp_path}"):
        read(tmp_path)


def test_the_page_has_the_marks_once() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)


def test_every_fault_is_told_apart() -> None:
    names = [*(fault.name for fault in FAULTS), *(damage.name for damage in DAMAGES)]
    assert len(names) == len(set(names))
    assert not [fault.name for fault in FAULTS if fault.goal_s is not None and fault.is_apart], "their time is measured on a quiet machine"
    assert [fault.name for fault in FAULTS if fault.quick] == ["kill -9 of rank 1"]
