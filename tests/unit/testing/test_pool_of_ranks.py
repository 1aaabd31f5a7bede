"""The pool of ranks that other tests run on: what hangs in it, or dies, is told with its stacks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megavlm.parallel.watchdog import POLL_S, Watchdog
from megavlm.testing import pool as pools
from megavlm.testing.pool import RankError, RankPool


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[RankPool]:
    """A pool of its own: what happens to it is for good."""
    monkeypatch.setattr(pools, "GRACE_S", 0.5)
    ranks = RankPool(2)
    yield ranks
    ranks.close()


def hang_behind_a_watchdog(folder: str) -> None:
    """As a run does that has ended: its watchdog set and took back the only timer that faulthandler has."""
    with Watchdog(Path(folder), 0, 1) as dog:
        dog.enter("a step", 600, "step_s")
        time.sleep(2 * POLL_S)
    if os.environ["RANK"] == "1":
        hangs_here()


def rank_and_pid() -> tuple[str, int]:
    return os.environ["RANK"], os.getpid()


def hangs_here() -> None:
    time.sleep(600)


def test_a_rank_that_hangs_is_ended_and_tells_where(two: RankPool, tmp_path: Path) -> None:
    before = two.run(rank_and_pid, world_size=2)
    with pytest.raises(RankError, match="rank 1 did not answer within 2 s") as caught:
        two.run(hang_behind_a_watchdog, str(tmp_path), world_size=2, timeout_s=2.0)
    assert "in hangs_here" in str(caught.value)
    assert not set(before) & set(two.run(rank_and_pid, world_size=2)), "others take their places"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_is_named(two: RankPool) -> None:
    with pytest.raises(RankError, match="rank 0 died"):
        two.run(die)


def die_or_answer_late(other: str) -> str:
    if os.environ["RANK"] == "0":
        die()
    time.sleep(0.5)
    return other


def test_an_answer_to_an_earlier_task_is_none_to_the_next(two: RankPool) -> None:
    for _ in range(2):
        with pytest.raises(RankError, match="rank 0 died"):
            two.run(die_or_answer_late, "stale", world_size=2)
        assert [rank for rank, _ in two.run(rank_and_pid, world_size=2)] == ["0", "1"]
