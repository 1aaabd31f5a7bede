"""The table of exit codes, and that every place that has a code of its own means the same by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.checkpoint import watchdog
from megavlm.cli import errors
from megavlm.config.exits import EXIT_NOTE_VARIABLE, Exit

DOCS = Path(__file__).parents[3] / "docs"


def test_places_with_codes_of_their_own_mean_the_same() -> None:
    assert errors.EXIT_USER_ERROR == Exit.USER
    assert errors.EXIT_FAULT == Exit.FAULT
    assert watchdog.EXIT_CODE == Exit.SAVE_TIMEOUT


def test_codes_of_our_own_stay_clear_of_the_shells_and_of_signals() -> None:
    """sysexits.h ends at 78, but 0-2 and 126 up are the shell's; torchrun and SLURM use 1."""
    assert all(code < 126 for code in Exit)
    assert len({int(code) for code in Exit}) == len(Exit)
    assert all(code.meaning for code in Exit)


def test_a_code_in_words() -> None:
    assert Exit.describe(77) == Exit.HUNG.meaning
    assert Exit.describe(137) == "ended by signal 9"
    assert Exit.describe(3) == "unknown"


def test_the_documents_list_every_code() -> None:
    table = (DOCS / "training.md").read_text(encoding="utf-8")
    assert [code.name for code in Exit if f"| {code.value} |" not in table] == []


def test_a_failure_with_a_code_of_its_own_ends_with_it_and_no_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failure(RuntimeError):
        exit_code = Exit.FAULTS_EXHAUSTED

    assert errors.report(Failure("step 3: loss nan")) == 78
    assert capsys.readouterr().err == "megavlm: error: step 3: loss nan\n"
    monkeypatch.setenv(EXIT_NOTE_VARIABLE, str(tmp_path / "note"))
    for code in (0, Exit.HUNG, Exit.FAULT):
        errors.note_exit(code)
    assert (tmp_path / "note").read_text() == "77\n", "the first failure's"
