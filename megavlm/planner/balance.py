"""Equal work for every rank: longest-processing-time assignment with equal counts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


class BalanceError(ValueError):
    """The items cannot be dealt out in equal numbers."""


def balance(costs: Sequence[float], num_bins: int) -> list[list[int]]:
    """Deal items out to `num_bins` bins, equally many each, so that the costliest bin is cheap.

    Longest processing time first (Graham 1969, SIAM J. Appl. Math. 17(2)) with a cap on the count; then items of the costliest bin
    are swapped with cheaper ones of other bins for as long as that lowers its cost. Deterministic: ties go to the lower index.

    Returns: item indices of each bin, costliest item first.

    Raises:
        BalanceError: the number of items is not a multiple of `num_bins`.
    """
    if num_bins < 1 or len(costs) % num_bins:
        raise BalanceError(f"{len(costs)} items cannot be dealt out equally to {num_bins} bins")
    capacity = len(costs) // num_bins
    order = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0.0] * num_bins
    heap = [(0.0, b) for b in range(num_bins)]
    for item in order:
        load, lightest = heapq.heappop(heap)
        bins[lightest].append(item)
        loads[lightest] = load + costs[item]
        if len(bins[lightest]) < capacity:
            heapq.heappush(heap, (loads[lightest], lightest))
    _swap(costs, bins, loads)
    return [sorted(items, key=lambda i: (-costs[i], i)) for items in bins]


def _swap(costs: Sequence[float], bins: list[list[int]], loads: list[float]) -> None:
    """Lower the costliest bin by the best swap with another bin, until none helps (at most two rounds a bin)."""
    for _ in range(2 * len(bins)):
        worst = max(range(len(bins)), key=lambda b: (loads[b], -b))
        best: tuple[float, int, int, int] | None = None
        for other in sorted((b for b in range(len(bins)) if b != worst), key=lambda b: (loads[b], b))[:4]:
            gap = loads[worst] - loads[other]
            for i, mine in enumerate(bins[worst]):
                for j, theirs in enumerate(bins[other]):
                    moved = costs[mine] - costs[theirs]
                    # The costlier of the two bins afterwards is lowered by min(moved, gap - moved).
                    gain = min(moved, gap - moved)
                    if gain > 1e-12 * loads[worst] and (best is None or gain > best[0]):
                        best = (gain, other, i, j)
        if best is None:
            return
        _, other, i, j = best
        moved = costs[bins[worst][i]] - costs[bins[other][j]]
        bins[worst][i], bins[other][j] = bins[other][j], bins[worst][i]
        loads[worst] -= moved
        loads[other] += moved
