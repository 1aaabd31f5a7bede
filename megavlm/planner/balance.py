"""Equal work for every rank and every microbatch.

A step lasts as long as its busiest rank. In a pipeline it is worse: what waits for the slowest of several microbatches waits once per
microbatch. So packs are dealt out in three moves: packs of a microbatch make its cost usual; microbatches with the same number cost the
same on all ranks; and their sums are equal, in total and in each part of the work that has stages of its own.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

SWAPS_PER_RANK = 6
"""Swaps tried at most, times the number of ranks. More changed nothing measurable on 64 ranks."""

TOLERANCE = 5e-4
"""Excess of a rank over the mean that is left alone, as a share: less than the estimate of FLOPs is worth."""

PARTNERS = 8
"""Ranks that an overloaded one tries to swap with across groups."""


class BalanceError(ValueError):
    """The items cannot be dealt out in equal numbers."""


def balance(costs: Sequence[float], num_bins: int) -> list[list[int]]:
    """Deal items out to `num_bins` bins, equally many each, so that the costliest bin is cheap.

    Longest processing time first (Graham 1969, SIAM J. Appl. Math. 17(2)) with a cap on the count. Deterministic: ties go to the
    lower index.

    Returns: item indices of each bin, costliest item first.

    Raises:
        BalanceError: the number of items is not a multiple of `num_bins`.
    """
    if num_bins < 1 or len(costs) % num_bins:
        raise BalanceError(f"{len(costs)} items cannot be dealt out equally to {num_bins} bins")
    capacity = len(costs) // num_bins
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    heap = [(0.0, b) for b in range(num_bins)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, lightest = heapq.heappop(heap)
        bins[lightest].append(item)
        if len(bins[lightest]) < capacity:
            heapq.heappush(heap, (load + costs[item], lightest))
    return bins


def deal(costs: Sequence[Sequence[float]], num_ranks: int, num_microbatches: int) -> list[list[list[int]]]:
    """Packs of each microbatch of each rank.

    `costs`: of each pack its total, then the parts of it that may have pipeline stages of their own (the encoder's). Packs are sorted by
    their total and cut into groups of `num_ranks` alike ones: one of each group for each rank, the costliest to the rank with the least
    so far. Then ranks swap within groups for as long as that lowers the squared distances of all ranks' sums, total and parts, from
    their means. Where a rank still has too much (a pack of an outsized picture costs more than the cheapest of the other groups make
    up for), it swaps across groups. Each rank then makes its packs into microbatches by `balance`: alike on all ranks, as their
    packs are. Deterministic.

    Returns: [rank][microbatch] -> indices of packs; on all ranks the microbatches go uphill to the costliest in the middle, and
    downhill again. Of the orders simulated in benchmarks/balance.py this ends a 1F1B pipeline first, before what equal microbatches
    would need: the cheapest run while it fills and drains, when most stages wait.

    Raises:
        BalanceError: the packs do not divide among microbatches.
    """
    if num_ranks < 1 or num_microbatches < 1 or len(costs) % (num_ranks * num_microbatches):
        raise BalanceError(f"{len(costs)} packs cannot be dealt out equally to {num_ranks} ranks x {num_microbatches} microbatches")
    work = np.asarray(costs, dtype=np.float64).reshape(len(costs), -1)
    work = work / max(float(work[:, 0].mean()), 1e-300)
    order = np.argsort(-work[:, 0], kind="stable").reshape(-1, num_ranks)
    load = np.zeros(num_ranks)
    for group in order:
        # `group` is sorted, costliest first: it goes to the ranks from the least loaded one on.
        group[:] = group[np.argsort(np.argsort(load, kind="stable"), kind="stable")]
        load += work[group, 0]
    _swap_in_groups(work, order)
    _swap_across(work, order)
    return [_microbatches(work[:, 0], order[:, rank].tolist(), num_microbatches) for rank in range(num_ranks)]


def _microbatches(costs: npt.NDArray[np.float64], packs: list[int], count: int) -> list[list[int]]:
    """One rank's packs as `count` microbatches of about equal cost, uphill and downhill."""
    groups = [[packs[i] for i in items] for items in balance([float(costs[p]) for p in packs], count)]
    groups.sort(key=lambda items: -sum(float(costs[p]) for p in items))
    return [*groups[1::2][::-1], *groups[0::2]]


def _swap_in_groups(work: npt.NDArray[np.float64], order: npt.NDArray[np.int64]) -> None:
    """Swap packs of a group between ranks. `work` (packs, parts); `order` (groups, ranks) is changed in place."""
    num_ranks = order.shape[1]
    load = work[order].sum(axis=0)
    away = load - load.mean(axis=0)
    settled = np.zeros(num_ranks, dtype=np.bool_)
    for _ in range(SWAPS_PER_RANK * num_ranks):
        distance = np.where(settled, -1.0, (away**2).sum(axis=1))
        worst = int(np.argmax(distance))
        if distance[worst] <= 0:
            return
        # What `worst` would gain in each part by taking each other rank's microbatch of each group instead of its own.
        gain = work[order] - work[order[:, worst]][:, None, :]
        change = 2 * (gain * (away[worst] - away + gain)).sum(axis=2)
        group, other = divmod(int(np.argmin(change)), num_ranks)
        if change[group, other] >= -1e-12:
            settled[worst] = True
            continue
        away[worst] += gain[group, other]
        away[other] -= gain[group, other]
        order[group, [worst, other]] = order[group, [other, worst]]
        settled[other] = False


def _swap_across(work: npt.NDArray[np.float64], order: npt.NDArray[np.int64]) -> None:
    """Relieve ranks whose total is above the mean by more than TOLERANCE: swap any pack with any of the least loaded ranks'.
    Arguments as above."""
    num_groups, num_ranks = order.shape
    load = work[order].sum(axis=0)
    away = load - load.mean(axis=0)
    for _ in range(SWAPS_PER_RANK * num_ranks):
        worst = int(np.argmax(away[:, 0]))
        if away[worst, 0] <= TOLERANCE * num_groups:
            break
        others = np.argsort(away[:, 0], kind="stable")[:PARTNERS]
        gain = work[order[:, others]][None] - work[order[:, worst]][:, None, None, :]
        change = 2 * (gain * (away[worst] - away[others] + gain)).sum(axis=3)
        mine, theirs, place = (int(i) for i in np.unravel_index(int(np.argmin(change)), change.shape))
        if change[mine, theirs, place] >= -1e-12:
            break
        other = int(others[place])
        away[worst] += gain[mine, theirs, place]
        away[other] -= gain[mine, theirs, place]
        order[mine, worst], order[theirs, other] = order[theirs, other], order[mine, worst]
