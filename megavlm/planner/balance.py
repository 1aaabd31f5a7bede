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

    `costs`: of each pack its total, then the parts of it that may have pipeline stages of their own (the encoder's). Packs become
    microbatches of equal numbers by `balance`. Those are sorted by their total and cut into `num_microbatches` groups of `num_ranks`
    alike ones: one of each group for each rank, the costliest to the rank with the least so far. Then ranks swap within
    groups for as long as that lowers the squared distances of all ranks' sums, total and parts, from their means.
    Deterministic.

    Returns: [rank][microbatch] -> indices of packs; on all ranks the microbatches go uphill to the costliest in the middle, and
    downhill again. Of the orders simulated in benchmarks/balance.py this ends a 1F1B pipeline first, before what equal microbatches
    would need: the cheapest run while it fills and drains, when most stages wait.

    Raises:
        BalanceError: the packs do not divide among microbatches.
    """
    table = np.asarray(costs, dtype=np.float64).reshape(len(costs), -1)
    packs = balance(table[:, 0].tolist(), num_ranks * num_microbatches)
    work = np.stack([table[items].sum(axis=0) for items in packs])
    order = np.argsort(-work[:, 0], kind="stable").reshape(num_microbatches, num_ranks)
    load = np.zeros(num_ranks)
    for group in order:
        # `group` is sorted, costliest first: it goes to the ranks from the least loaded one on.
        group[:] = group[np.argsort(np.argsort(load, kind="stable"), kind="stable")]
        load += work[group, 0]
    _swap(work / max(float(work[:, 0].mean()), 1e-300), order)
    hill = [*range(num_microbatches)[1::2][::-1], *range(num_microbatches)[0::2]]
    return [[packs[microbatch] for microbatch in order[hill, rank]] for rank in range(num_ranks)]


def _swap(work: npt.NDArray[np.float64], order: npt.NDArray[np.int64]) -> None:
    """Swap microbatches of a group between ranks. `work` (microbatches, parts); `order` (groups, ranks) is changed in place."""
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
