"""The simulation of benchmarks/goodput.py against what can be worked out by hand."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "goodput.py"


@pytest.fixture(scope="module")
def goodput() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_goodput", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_failures_only_the_start_and_stalls_are_lost(goodput: Any) -> None:
    (outcome,) = goodput.simulate(goodput.Times(stall_s=0.5, save_every_steps=10), 1, 1.0, 0.0)
    assert outcome.failures == 0
    assert outcome.share == pytest.approx((1 - 90 / 86400) * 60 / 60.5, abs=1e-4)
    assert set(outcome.parts) == {"first start", "stalls of saves", "unfinished at the end"}


@pytest.mark.parametrize("local_every_steps", [0, 5])
def test_with_failures_it_is_what_is_to_be_expected(local_every_steps: int, goodput: Any) -> None:
    times = goodput.Times(hash_every_steps=0, save_s=20.0, local_every_steps=local_every_steps)
    outcomes = goodput.simulate(times, 3, 15.0, 3 * 419 / 54)
    assert mean(o.share for o in outcomes) == pytest.approx(goodput.expected_share(times, 3 * 419 / 54), abs=0.005)
    for outcome in outcomes:
        assert outcome.kept + sum(outcome.parts.values()) == pytest.approx(outcome.elapsed)
        assert all(seconds >= 0 for seconds in outcome.parts.values())


def test_given_failures_cost_what_can_be_worked_out_by_hand(goodput: Any) -> None:
    """100 s: a start of 9 s, 25 steps, a kill; noticed after 2 s, a start of 10 s, 5 lost steps again; a stop; a kill while it starts."""
    times = goodput.Times(
        step_s=1.0, stall_s=0.0, save_s=0.5, save_every_steps=10, hash_every_steps=0, detect_crash_s=2.0, hang_limit_s=4.0,
        detect_hang_s=1.0, first_start_s=9.0, start_s=10.0, load_s=0.0, replace_s=0.0,
    )  # fmt: skip
    failures = [goodput.Failure(34.5, "crash"), goodput.Failure(58.25, "hang"), goodput.Failure(64.0, "hang")]
    outcome = goodput.Run(times, 100.0 / goodput.DAY_S, 0.0, 0, failures).play()
    # Steps 21 to 31 from 46.5 s on, back to 30; the second stop falls into a start, and is a kill: steps again from 76 s on.
    assert (outcome.failures, outcome.kept) == (3, 30 + 23)
    assert outcome.parts["steps made again"] == 5 + 1 and outcome.parts["noticing crashes"] == 4.0
    assert outcome.parts["steps cut off"] == pytest.approx(0.5 + 0.75)


def test_a_seed_gives_the_same_run(goodput: Any) -> None:
    times = goodput.Times(local_every_steps=3)
    first, again, other = (goodput.simulate(times, n, 2.0)[-1] for n in (1, 1, 2))
    assert first == again and first != other


def test_corruption_costs_what_was_made_since_it_was_last_ruled_out(goodput: Any) -> None:
    seldom, often = (goodput.simulate(goodput.Times(hash_every_steps=n), 2, 12.0, 25.0) for n in (2000, 100))
    lost = [mean(o.parts.get("lost to silent corruption", 0.0) for o in outcomes) for outcomes in (seldom, often)]
    assert lost[0] > 5 * lost[1] > 0
