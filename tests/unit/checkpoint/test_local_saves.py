"""How often a stage tries to save where there is no room, and how often it says so."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

from megavlm.checkpoint.saver import Outcome
from megavlm.training.local_saves import MOST_LEFT_OUT, LocalSaves


def tried(saves: LocalSaves, steps: range, error: str | None) -> tuple[list[int], list[str]]:
    """Steps of the attempts, and what was told."""
    attempts, told = [], []
    for step in steps:
        if saves.is_due(step):
            attempts.append(step)
            news = saves.ended(Outcome(Path(f"{step:08d}-all"), True, 0.0, 0.0, error))
            told += [] if news is None else [news.text]
    return attempts, told


def test_failures_make_it_rare_and_are_told_of_once() -> None:
    saves = LocalSaves(20)
    assert tried(saves, range(1, 101), None) == ([20, 40, 60, 80, 100], [])
    attempts, told = tried(saves, range(101, 100_001), "no room")
    gaps = [after - before for before, after in pairwise(attempts)]
    assert gaps[:6] == [40, 80, 160, 320, 640, 1280] and set(gaps[5:]) == {20 * MOST_LEFT_OUT}
    assert len(told) == 1 and told[0].startswith("no room; ")


def test_room_that_came_back_is_used_and_told_of() -> None:
    saves = LocalSaves(10)
    tried(saves, range(1, 101), "no room")
    attempts, told = tried(saves, range(101, 301), None)
    assert len(told) == 1 and "written again" in told[0]
    assert attempts[1:] == list(range(attempts[0] + 10, 301, 10)), "as often as ever"
    assert len(tried(saves, range(301, 400), "no room")[1]) == 1, "a new failure is told of"
