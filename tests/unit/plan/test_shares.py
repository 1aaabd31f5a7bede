"""Shares that change over the steps, repeats and caps: exact, within a sample of the target, known ahead."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.config.data import MixtureEntry
from megavlm.data.mixture import Mixture, MixtureEnd, MixtureError, Source
from megavlm.data.shares import RAMP_PIECES, pieces

weights = st.sampled_from([0.0, 0.001, 0.3, 1.0, 2.5, 7.0, 400.0])
step_weights = st.dictionaries(st.integers(0, 40), weights, min_size=1, max_size=4)
FIVE_EACH = {"a": Source(5), "b": Source(5)}
caps = st.one_of(st.none(), st.sampled_from([0.3, 1.0, 1.5, 4.0]))


@st.composite
def mixtures(draw):
    """Entries and sources of 1 to 6 sources: curricula with caps, or repeats with caps."""
    names = [f"s{i}" for i in range(draw(st.integers(1, 6)))]
    sources = {name: Source(draw(st.integers(4, 90)), Fraction(draw(st.integers(1, 30)))) for name in names}
    if draw(st.booleans()):
        repeats = st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.7])
        return {name: MixtureEntry(repeats=draw(repeats), max_epochs=draw(caps)) for name in names}, sources
    entries = {}
    for name in names:
        weight = draw(st.one_of(weights, step_weights))
        entries[name] = MixtureEntry(weight=weight, change=draw(st.sampled_from(["linear", "steps"])), max_epochs=draw(caps))
    entries["always"], sources["always"] = MixtureEntry(weight=0.5, max_epochs=draw(caps)), Source(20, Fraction(7))
    return entries, sources


def steps_of_50(shares) -> Fraction:
    """A step takes samples that are 50 long together."""
    assert sum(shares.values()) == 1
    return Fraction(50)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(mixtures(), st.integers(0, 300))
def test_share_is_within_one_sample_at_every_draw_and_resumes_anywhere(mixture, cut):
    entries, sources = mixture
    stream = Mixture(entries, sources, seed=1, rate=steps_of_50)
    k = len(stream.sources)
    bound = 1 - Fraction(1, max(2 * k - 2, 2)) + Fraction(1, 2**50)
    again, drawn = None, []
    for n in range(1, 301):
        if n == cut:
            again = Mixture(entries, sources, seed=1, counters=stream.counters, rate=steps_of_50)
        try:
            drawn.append(stream.draw())
        except MixtureEnd:
            assert stream.target.end_draws == n - 1
            break
        assert again is None or again.draw() == drawn[-1]
        target = stream.target.at(n)
        assert sum(target.values()) == n
        for name, count in stream.counters.items():
            assert abs(count - target[name]) <= bound, (n, name)
            if entries[name].max_epochs is not None:
                assert count <= int(Fraction(str(entries[name].max_epochs)) * sources[name].num_rows)


def test_targets_follow_the_weights_of_the_steps():
    """Two sources of different length: linear from 1:1 at step 10 to 1:4 at step 20, then a jump to the second alone at 30."""
    entries = {
        "long": MixtureEntry(weight={0: 1, 29: 1, 30: 0}, change="steps"),
        "short": MixtureEntry(weight={10: 1, 20: 4}),
    }
    sources = {"long": Source(10**6, Fraction(30)), "short": Source(10**6, Fraction(10))}
    target = Mixture(entries, sources, seed=0, rate=lambda shares: Fraction(20000)).target
    # Steps 0-9: mean length 20, 1000 samples a step.
    assert target.at(10000) == {"long": 5000, "short": 5000}
    assert target.step_at(10000) == 10 and target.step_at(500) == 0.5
    draws = Fraction(10000)
    due = Fraction(5000)
    for step in range(10, 20):
        weight = 1 + Fraction(3 * (step - 10), 10)
        mean = (30 + 10 * weight) / (1 + weight)
        draws += Fraction(20000) / mean
        due += Fraction(20000) / mean * weight / (1 + weight)
        assert abs(target.step_at(int(draws)) - (step + 1)) < 0.01
        assert abs(target.at(int(draws))["short"] - due) < 2
    after = int(draws) + 5
    assert target.at(after + 100)["short"] - target.at(after)["short"] == 80
    last = next(n for n in range(after, after + 10**6) if target.step_at(n) >= 30)
    assert target.at(last + 50)["short"] - target.at(last)["short"] == 50


def test_repeats_make_exact_epochs():
    """repeats=r: after every global epoch each sample of the source was seen exactly r times."""
    rows = {"a": 37, "b": 11, "c": 90}
    repeats = {"a": 1.0, "b": 3.0, "c": 0.1}
    entries = {name: MixtureEntry(repeats=r) for name, r in repeats.items()}
    mixture = Mixture(entries, {name: Source(n) for name, n in rows.items()}, seed=4)
    epoch = 37 + 33 + 9
    seen: dict[str, list[int]] = {name: [] for name in rows}
    for passed in range(1, 11):
        for _ in range(epoch):
            draw = mixture.draw()
            seen[draw.source].append(draw.row)
        assert mixture.counters == {"a": 37 * passed, "b": 33 * passed, "c": 9 * passed}
    for name, rows_seen in seen.items():
        expected = round(10 * repeats[name])
        assert sorted(rows_seen) == sorted(list(range(rows[name])) * expected)


def test_a_capped_source_hands_its_share_to_the_others_and_the_last_ends_the_stream():
    entries = {
        "small": MixtureEntry(weight=3, max_epochs=2),
        "large": MixtureEntry(weight=1),
        "other": MixtureEntry(weight=1, max_epochs=1),
    }
    sources = {"small": Source(30), "large": Source(1000), "other": Source(50)}
    mixture = Mixture(entries, sources, seed=0)
    for _ in range(100):
        mixture.draw()
    assert mixture.counters == {"small": 60, "large": 20, "other": 20}
    for _ in range(60):
        assert mixture.draw().source != "small"
    assert mixture.counters == {"small": 60, "large": 50, "other": 50} and mixture.target.end_draws is None
    assert {mixture.draw().source for _ in range(200)} == {"large"}

    ends = Mixture({**entries, "large": MixtureEntry(weight=1, max_epochs=0.05)}, sources, seed=0)
    assert ends.target.end_draws == 160
    assert [ends.draw().ordinal for _ in range(160)] == list(range(160))
    with pytest.raises(MixtureEnd, match="after 160 samples"):
        ends.draw()


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(MixtureError, match="from step 20 on no source"):
        Mixture({"a": MixtureEntry(weight={0: 1, 20: 0}, change="steps")}, {"a": Source(5)}, seed=0)
    with pytest.raises(MixtureError, match="in steps 0 to 99 no source has a weight above 0"):
        Mixture({"a": MixtureEntry(weight={0: 0, 100: 0, 200: 1}), "b": MixtureEntry(weight={100: 0, 150: 2})}, FIVE_EACH, seed=0)
    with pytest.raises(MixtureError, match="in steps 0 to 99 no source has a weight above 0"):
        Mixture({"a": MixtureEntry(weight={0: 0, 100: 1}, change="steps")}, {"a": Source(5)}, seed=0)
    with pytest.raises(MixtureError, match="max_epochs=0.1 of its samples is less than one"):
        Mixture({"a": MixtureEntry(weight=1, max_epochs=0.1)}, {"a": Source(5)}, seed=0)


@pytest.mark.parametrize("length", [1, 3, 100, 1000])
@pytest.mark.parametrize("weight", [lambda n: {0: 0, n: 1}, lambda n: {0: 0, n: 2, 2 * n: 0, 3 * n: 1}, lambda n: {0: 1, n: 0, 2 * n: 1}])
def test_a_line_through_exactly_zero_is_drawn_from(length, weight):
    """Alone all draws are its own; beside another that moves with it, the two keep their proportion."""
    alone = Mixture({"a": MixtureEntry(weight=weight(length))}, {"a": Source(10)}, seed=1, rate=steps_of_50)
    assert {alone.draw().source for _ in range(300)} == {"a"} and alone.counters == {"a": 300}
    entries = {"a": MixtureEntry(weight=weight(length)), "b": MixtureEntry(weight={k: 3 * w for k, w in weight(length).items()})}
    both = Mixture(entries, FIVE_EACH, seed=1, rate=steps_of_50)
    for drawn in range(1, 400):
        both.draw()
        assert abs(both.counters["a"] - drawn / 4) < 1


def test_long_ramps_take_few_pieces():
    ramp = pieces([MixtureEntry(weight={0: 0, 100_000: 1}), MixtureEntry(weight=1)], [5, 5])
    assert len(ramp) == RAMP_PIECES + 1
    assert all(a.end == b.start for a, b in pairwise(ramp)) and ramp[-1].end is None
    for piece in ramp[:-1]:
        assert Fraction(*piece.weights) == Fraction(piece.start + piece.end - 1, 2) / 100_000
