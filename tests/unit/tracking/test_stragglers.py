"""Slow ranks are told from busy and from waiting ones."""

from __future__ import annotations

from megavlm.tracking.ranks import RankReport
from megavlm.tracking.stragglers import StragglerWatch


def reports(*own: float, stages: int = 1, waits: bool = True) -> list[RankReport]:
    """A rank's own work each; who is done earlier waits for the slowest."""
    longest = max(own)
    return [
        RankReport(
            rank=rank,
            place={"data": rank, "pipeline": rank * stages // len(own), "context": 0, "tensor": 0},
            peak_bytes=1,
            estimated_bytes={},
            time_s={"encoder": work - 0.1, "language": 0.1, "communication": longest - work, "pipeline": 0.5},
        )
        for rank, work in enumerate(own)
    ]


def test_a_rank_is_named_once_after_so_many_reports() -> None:
    watch = StragglerWatch(1.5, 3, {2: "node7, GPU 3"})
    slow = reports(1.0, 1.1, 2.0, 0.9)
    for _ in range(2):
        record, named = watch.look(slow)
        assert record["rank"] == 2 and abs(record["skew"] - 2.0) < 1e-9 and not named
    ((rank, skew, text),) = watch.look(slow)[1]
    assert (rank, round(skew, 6)) == (2, 2.0)
    assert "rank 2 (node7, GPU 3)" in text and "2 s of its own work" in text and "2.0 times the 1 s" in text and "in encoder" in text
    assert not watch.look(slow)[1]


def test_it_is_named_again_after_it_was_well() -> None:
    watch = StragglerWatch(1.5, 2, {})
    slow, well = reports(1.0, 2.0), reports(1.0, 1.0)
    told = [len(watch.look(r)[1]) for r in (slow, well, slow, slow, slow, well, slow, slow)]
    assert told == [0, 0, 0, 1, 0, 0, 0, 1]


def test_of_two_ranks_the_slower_is_compared_with_the_other() -> None:
    assert StragglerWatch(1.5, 1, {}).look(reports(1.0, 1.6))[1][0].rank == 1


def test_pipeline_stages_have_work_of_their_own() -> None:
    """Ranks 0 and 1 are the first stage, which has the encoder."""
    record, named = StragglerWatch(1.5, 1, {}).look(reports(3.0, 3.1, 1.0, 1.2, stages=2))
    assert not named and record["rank"] == 3
    assert StragglerWatch(1.5, 1, {}).look(reports(3.0, 1.0, stages=2)) == ({}, []), "nobody to compare with"


def test_without_times_there_is_nothing_to_say() -> None:
    untimed = [RankReport(rank=r, place={"pipeline": 0}, peak_bytes=1, estimated_bytes={}) for r in range(2)]
    assert StragglerWatch(1.5, 1, {}).look(untimed) == ({}, [])
