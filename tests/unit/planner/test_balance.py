"""Equal work for ranks and microbatches."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megavlm.planner.balance import BalanceError, balance, deal


def test_balance_is_longest_processing_time_with_equal_counts():
    bins = balance([9, 1, 8, 2, 7, 3, 6, 4], 4)
    assert bins == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert balance([5, 5, 5, 5], 2) == [[0, 2], [1, 3]], "ties go to the lower index"
    with pytest.raises(BalanceError, match="5 items cannot be dealt out equally to 2 bins"):
        balance([1] * 5, 2)


@settings(max_examples=50, derandomize=True, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3), st.integers(0, 10**6))
def test_deal_gives_every_pack_once_uphill_and_downhill_on_all_ranks(ranks, microbatches, packs, seed):
    rng = np.random.default_rng(seed)
    costs = rng.integers(0, 1000, (ranks * microbatches * packs, 2)).astype(float)
    dealt = deal(costs, ranks, microbatches)
    assert [len(rank) for rank in dealt] == [microbatches] * ranks
    assert all(len(items) == packs for rank in dealt for items in rank)
    assert sorted(i for rank in dealt for items in rank for i in items) == list(range(len(costs)))
    work = np.array([[costs[items, 0].sum() for items in rank] for rank in dealt])
    top = microbatches // 2
    assert (np.diff(work[:, : top + 1], axis=1) >= 0).all() and (np.diff(work[:, top:], axis=1) <= 0).all()
    assert deal(costs, ranks, microbatches) == dealt


def test_deal_comes_close_to_the_best_there_is():
    """Two groups of five: the optimum within groups, by trying all ways."""
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(60):
        costs = rng.lognormal(0, 0.3, (10, 1))
        dealt = deal(costs, 5, 2)
        ours = max(sum(costs[i, 0] for items in rank for i in items) for rank in dealt)
        ordered = np.sort(costs[:, 0])
        best = min(max(a + b for a, b in zip(ordered[:5], chosen, strict=True)) for chosen in itertools.permutations(ordered[5:]))
        ratios.append(ours / best)
    assert np.mean(ratios) < 1.005 and max(ratios) < 1.05


def test_an_outsized_pack_is_made_up_for():
    """One pack of twice the usual cost: its rank gets the cheapest of all groups, and waits for nobody."""
    rng = np.random.default_rng(3)
    costs = rng.normal(1, 0.1, (512, 1))
    costs[17] = 2.0
    for microbatches in (8, 4):
        dealt = deal(costs, 64, microbatches)
        loads = [sum(costs[i, 0] for items in rank for i in items) for rank in dealt]
        assert 1 - np.mean(loads) / max(loads) < 0.001
    with pytest.raises(BalanceError, match="512 packs cannot be dealt out equally to 3 ranks x 8 microbatches"):
        deal(costs, 3, 8)


def test_both_parts_are_balanced_where_stages_hold_one_each():
    """64 ranks x 8 microbatches: a part that has pipeline stages of its own is as even as the whole."""
    rng = np.random.default_rng(1)
    vision = rng.lognormal(0, 0.2, 512)
    costs = np.stack([vision + rng.lognormal(1.5, 0.05, 512), vision], axis=1)

    def idle(part: int, with_parts: bool) -> float:
        dealt = deal(costs if with_parts else costs[:, :1], 64, 8)
        loads = [sum(costs[i, part] for items in rank for i in items) for rank in dealt]
        return 1 - np.mean(loads) / max(loads)

    assert idle(0, True) < 0.002 and idle(1, True) < 0.015
    assert idle(1, True) < idle(1, False) / 2
