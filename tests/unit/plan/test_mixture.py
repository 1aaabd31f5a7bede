"""Shares within a sample, permutations exactly once an epoch, state of one counter a source."""

import random

import pytest

from megavlm.config.data import MixtureEntry
from megavlm.data.mixture import Mixture, MixtureError, Source, SourceOrder


def constant(weights: dict[str, float], rows: dict[str, int], seed: int, counters: dict[str, int] | None = None) -> Mixture:
    entries = {name: MixtureEntry(weight=weight) for name, weight in weights.items()}
    return Mixture(entries, {name: Source(n) for name, n in rows.items()}, seed, counters)


def worst_deviation(weights: dict[str, float], draws: int) -> float:
    mixture = constant(weights, dict.fromkeys(weights, 50), seed=1)
    whole, worst = sum(weights.values()), 0.0
    for n in range(1, draws + 1):
        mixture.draw()
        worst = max(worst, *(abs(mixture.counters[name] - n * weight / whole) for name, weight in weights.items()))
    return worst


def test_share_is_within_one_sample_at_every_step():
    rng = random.Random(0)
    for _ in range(150):
        sources = rng.randint(2, 12)
        weights = {f"s{i}": 1.6 ** rng.uniform(0, 12) for i in range(sources)}
        assert worst_deviation(weights, 150) <= 1 - 1 / (2 * sources - 2) + 1e-9, weights


def test_share_holds_where_the_plain_largest_deficit_fails():
    weights = {"a": 1.0, "b": 5.0, "c": 13.0, "d": 56.0, "e": 56.0}
    counts, worst = dict.fromkeys(weights, 0), 0.0
    for n in range(1, 121):
        chosen = max(weights, key=lambda name: weights[name] * n - counts[name] * 131)
        counts[chosen] += 1
        worst = max(worst, *(abs(counts[name] - n * weights[name] / 131) for name in weights))
    assert worst > 1, "the docstring of Mixture claims this"
    assert worst_deviation(weights, 1000) < 1


def test_every_epoch_is_another_permutation():
    order = SourceOrder("docs", 97, seed=5)
    epochs = [[order.row(e * 97 + i) for i in range(97)] for e in range(4)]
    assert all(sorted(rows) == list(range(97)) for rows in epochs)
    assert len({tuple(rows) for rows in epochs}) == 4
    assert [SourceOrder("docs", 97, seed=5).row(n) for n in (300, 5, 96, 97)] == [order.row(n) for n in (300, 5, 96, 97)]


def test_order_depends_on_seed_and_name_but_not_on_other_sources():
    def rows(name: str, seed: int) -> list[int]:
        order = SourceOrder(name, 50, seed)
        return [order.row(n) for n in range(50)]

    assert rows("a", 1) != rows("a", 2) and rows("a", 1) != rows("b", 1)
    mixed = constant({"a": 1, "b": 3}, {"a": 50, "b": 70}, seed=1)
    drawn = [draw.row for draw in (mixed.draw() for _ in range(80)) if draw.source == "a"]
    assert drawn == rows("a", 1)[: len(drawn)]


def test_order_is_pinned():
    """A change here makes every stored cursor lead elsewhere: raise CURSOR_VERSION with it."""
    order = SourceOrder("docs", 10, seed=1234)
    assert [order.row(n) for n in range(12)] == [4, 0, 9, 5, 8, 2, 3, 1, 7, 6, 8, 0]


def test_counters_are_the_whole_state():
    weights, rows = {"a": 2.5, "b": 1, "zero": 0.0}, {"a": 7, "b": 11}
    mixture = constant(weights, rows, seed=3)
    stream = [mixture.draw() for _ in range(60)]
    assert mixture.sources == ("a", "b")
    assert [draw.ordinal for draw in stream] == list(range(60))
    for cut in range(60):
        counters = {name: sum(draw.source == name for draw in stream[:cut]) for name in ("a", "b")}
        again = constant(weights, rows, seed=3, counters=counters)
        assert [again.draw() for _ in range(60 - cut)] == stream[cut:]
    assert mixture.epochs == {"a": mixture.counters["a"] / 7, "b": mixture.counters["b"] / 11}


@pytest.mark.parametrize(
    ("weights", "rows", "message"),
    [
        ({"a": 1}, {"a": 0}, "'a' has no sample"),
        ({"a": float("inf")}, {"a": 5}, "inf is no finite number"),
        ({"a": 0}, {"a": 5}, "no source"),
    ],
)
def test_impossible_mixtures_are_refused(weights, rows, message):
    with pytest.raises(MixtureError, match=message):
        constant(weights, rows, seed=0)
