"""The parts of a step's time."""

from __future__ import annotations

import pytest

from megavlm.tracking.timeline import COLOURS, RankTimeline, StepSpan, page_of, write_timeline
from megavlm.tracking.timers import PARTS, Segment, StepClock, part, seconds_of, use_clock


class Hand:
    """Time that passes only when a test says so, on a device that gets only so far."""

    def __init__(self) -> None:
        self.time, self.device = 100.0, float("inf")

    def now(self) -> float:
        return self.time

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def is_reached(self, stamp: float) -> bool:
        return stamp <= self.device


@pytest.fixture
def hand():
    hand = Hand()
    hand.clock = StepClock(hand)
    use_clock(hand.clock)
    yield hand
    use_clock(None)


def spend(hand: Hand, seconds: float) -> None:
    hand.time += seconds


def occurring(times: dict[str, float]) -> dict[str, float]:
    assert set(times) == set(PARTS)
    return {name: seconds for name, seconds in times.items() if seconds}


def test_parts_add_up_and_inner_ones_are_taken_out(hand):
    hand.clock.begin_step()
    with part("data"):
        spend(hand, 1.0)
    for _ in range(2):
        with part("language", 3):
            spend(hand, 2.0)
            with part("encoder"):
                spend(hand, 4.0)
                with part("communication"):
                    spend(hand, 8.0)
            spend(hand, 16.0)
    spend(hand, 0.5)
    times = hand.clock.finish_step()
    assert occurring(times) == {"data": 1.0, "language": 36.0, "encoder": 8.0, "communication": 16.0, "other": 0.5}
    assert hand.clock.segments[1] == Segment("language", 3, 1.0, 3.0)
    assert {s.microbatch for s in hand.clock.segments if s.part in ("encoder", "communication")} == {3}, "of the part around them"


def test_time_between_steps_is_nobodys(hand):
    with part("data"):
        spend(hand, 7.0)
    hand.clock.begin_step()
    spend(hand, 1.0)
    assert occurring(hand.clock.finish_step()) == {"other": 1.0}
    with part("optimizer"):
        spend(hand, 9.0)
    hand.clock.begin_step()
    with part("optimizer"):
        spend(hand, 2.0)
    assert occurring(hand.clock.finish_step()) == {"optimizer": 2.0}


def test_a_part_that_raises_is_counted_and_left(hand):
    hand.clock.begin_step()
    with pytest.raises(KeyError), part("optimizer"):
        spend(hand, 1.0)
        raise KeyError
    with part("head"):
        spend(hand, 2.0)
    assert occurring(hand.clock.finish_step()) == {"optimizer": 1.0, "head": 2.0}


def test_a_part_turns_into_another(hand):
    hand.clock.begin_step()
    with part("language_backward"):
        spend(hand, 1.0)
        hand.clock.turn("encoder_backward", 2)
        spend(hand, 2.0)
    spend(hand, 4.0)
    assert occurring(hand.clock.finish_step()) == {"language_backward": 1.0, "encoder_backward": 2.0, "other": 4.0}
    assert [s.microbatch for s in hand.clock.segments] == [None, 2, None]


def test_what_a_device_has_not_done_counts_to_the_next_step(hand):
    """Nothing is waited for, and nothing is lost or counted twice."""
    hand.clock.begin_step()
    with part("language"):
        spend(hand, 5.0)
    with part("optimizer"):
        hand.device = hand.time
        spend(hand, 3.0)
    first = hand.clock.finish_step()
    spend(hand, 100.0)
    hand.clock.begin_step()
    with part("language"):
        spend(hand, 6.0)
    hand.device = float("inf")
    second = hand.clock.finish_step()
    assert occurring(first) == {"language": 5.0}
    assert occurring(second) == {"optimizer": 3.0, "language": 6.0}


def test_nothing_is_timed_without_a_clock():
    use_clock(None)
    with part("data"):
        pass


def timelines() -> list[RankTimeline]:
    segments = [Segment("encoder", 0, 0.0, 0.2), Segment("language", 0, 0.2, 0.5), Segment("optimizer", None, 0.5, 0.6)]
    late = [s._replace(begin_s=s.begin_s + 0.01, end_s=s.end_s + 0.01) for s in segments]
    return [
        RankTimeline("rank 0: <first>", segments, [StepSpan(7, 0.0, 0.6)]),
        RankTimeline("rank 1: last", late, [StepSpan(7, 0.01, 0.61)]),
    ]


def test_every_part_has_a_colour():
    assert set(COLOURS) == set(PARTS)


def test_timeline_page_and_picture(tmp_path):
    picture = write_timeline(tmp_path, timelines())
    page = (tmp_path / "timeline.html").read_text()
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert page == page_of(timelines())
    assert page.count("<rect") == 6 and page.count("<line") == 2
    assert "rank 0: &lt;first&gt;" in page and "<first>" not in page
    assert 'x="200000.0" y="0.05" width="300000.0"' in page
    assert "<td>300.00</td><td>300.00</td>" in page and "<td>600.00</td><td>600.00</td>" in page
    assert "http://" not in page and "https://" not in page


def test_seconds_of_segments():
    assert occurring(seconds_of(timelines()[0].segments)) == pytest.approx({"encoder": 0.2, "language": 0.3, "optimizer": 0.1})
