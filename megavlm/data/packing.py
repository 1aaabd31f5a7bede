"""Streaming subset-sum packing: which samples share a sequence.

A window of samples waits. The oldest seeds each pack; an exact subset-sum over the waiting lengths, oldest first, fills the rest of
the token budget, under a second budget on patches (vision work). Whenever some of the samples looked at add up to the budget
exactly, they are found: with a window of 256 and real length mixes that is nearly every time.

How long a sample can wait: every pack takes the oldest, so that a sample leaves with the `window`-th pack after it came at the
latest; and never more than MAX_WAIT_WINDOWS x `window` samples come after it before it leaves (`Packer` says how).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import gcd
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

LOOK_AHEAD_PATCHES = 96
"""Waiting samples that are tried where the patch budget decides: that search costs some 10 times the other one a sample."""

MAX_WAIT_WINDOWS = 8
"""No sample sees more than this x window later ones come before it leaves. Real mixes stay below 4."""


class PackingError(ValueError):
    """A sample or a budget with which no pack can be formed."""


@dataclass(frozen=True)
class Budget:
    """Limits of one pack.

    Raises:
        PackingError: a budget below 1.
    """

    length: int
    """Tokens (images, for vision_classification)."""
    patches: int | None = None
    """None: no limit."""
    patches_are_hard: bool = True
    """False: a pack that would not be full otherwise may hold more patches, as few more as possible."""

    def __post_init__(self) -> None:
        if self.length < 1 or (self.patches is not None and self.patches < 1):
            raise PackingError(f"budgets of a pack must be at least 1: {self.length} tokens, {self.patches} patches")


class Waiting(NamedTuple, Generic[T]):
    """One sample that waits for a place."""

    length: int
    patches: int
    sample: T
    """Whatever names it."""
    arrival: int = 0
    """Samples of the stream that came before it."""


class Packer(Generic[T]):
    """Forms packs from a stream, one at a time.

    `window` samples wait for a place. `packing=False`: one sample a pack, in order, nothing waits.

    The bound on waiting: with p samples ahead of it and a later ones behind it (in the window or gone), a sample could leave after p
    more packs of one sample each, having seen a + p later ones. As long as this number stays below MAX_WAIT_WINDOWS x window for
    everybody, nobody can come to wait longer. A choice that would break it for somebody is made again among the older half of the window,
    and so on; alone the oldest, at the end, raises nobody's number.

    Its state is `waiting`, oldest first: put it back and the same packs follow.
    """

    def __init__(self, budget: Budget, window: int, *, packing: bool = True, waiting: Sequence[Waiting[T]] = ()) -> None:
        if window < 1:
            raise PackingError(f"the packer's window must hold at least 1 sample, not {window}")
        self.budget, self.window, self.packing = budget, window, packing
        self.waiting: list[Waiting[T]] = list(waiting)

    @property
    def max_wait_samples(self) -> int:
        """No sample sees more later ones come before it leaves."""
        return MAX_WAIT_WINDOWS * self.window if self.packing else 0

    def next_pack(self, draw: Callable[[], Waiting[T] | None]) -> list[Waiting[T]]:
        """The next pack, in order of arrival; `draw` gives the next sample of the stream and is called until the window is full.

        It gives None when the stream has ended: then packs are formed from what waits; the pack is empty when nothing does.

        Raises:
            PackingError: a sample is longer than the budget, has more patches, or has no length.
        """
        window = self.window if self.packing else 1
        while len(self.waiting) < window and (new := draw()) is not None:
            self.waiting.append(self._checked(new))
        if not self.waiting:
            return []
        chosen = self._choose()
        pack = [self.waiting[i] for i in chosen]
        for i in reversed(chosen):
            del self.waiting[i]
        return pack

    def _choose(self) -> list[int]:
        seen = len(self.waiting)
        while True:
            chosen = choose(self.waiting if seen == len(self.waiting) else self.waiting[:seen], self.budget)
            if seen == 1 or self._keeps_bound(chosen):
                return chosen
            seen //= 2

    def _keeps_bound(self, chosen: Sequence[int]) -> bool:
        newest, count = self.waiting[-1].arrival, len(self.waiting)
        # Most are far from the bound: the first that stays is the oldest then, and the last has most others ahead.
        if newest - self.waiting[0].arrival + count <= self.max_wait_samples:
            return True
        # Behind each that stays as many come as leave; ahead of it, those leave that were chosen there.
        ahead, taken = 0, set(chosen)
        for i, w in enumerate(self.waiting):
            if i in taken:
                continue
            if newest - w.arrival + len(chosen) + ahead > self.max_wait_samples:
                return False
            ahead += 1
        return True

    def _checked(self, new: Waiting[T]) -> Waiting[T]:
        if not 1 <= new.length <= self.budget.length:
            raise PackingError(f"sample {new.sample}: its length of {new.length} is not between 1 and the budget of {self.budget.length}")
        most = self.budget.patches if self.budget.patches_are_hard else None
        if new.patches < 0 or (most is not None and new.patches > most):
            raise PackingError(f"sample {new.sample}: its {new.patches} patches are not between 0 and the budget of {most}")
        return new


def choose(waiting: Sequence[Waiting[T]], budget: Budget) -> list[int]:
    """Places in `waiting`, ascending and starting with 0 (the oldest), whose lengths come closest to the budget.

    Exact: no other subset that holds the oldest and keeps both budgets is longer. Where the longest breaks the patch budget,
    "other" are the subsets of the LOOK_AHEAD_PATCHES oldest. If the patch budget is a target and none of these that keeps it is full,
    the longest of them all is taken, and of several the one with the fewest patches.
    """
    room = budget.length - waiting[0].length
    chosen = [0] + [i + 1 for i in _fill_length((w.length for w in islice(waiting, 1, None)), room)]
    if budget.patches is None or sum(waiting[i].patches for i in chosen) <= budget.patches:
        return chosen
    few = waiting[1 : LOOK_AHEAD_PATCHES + 1]
    room_patches = budget.patches - waiting[0].patches
    within = _fill_both([w.length for w in few], [w.patches for w in few], room, room_patches, budget.patches_are_hard)
    within = [0] + [i + 1 for i in within]
    # Beyond the look-ahead may lie what a full pack needs.
    if budget.patches_are_hard or sum(waiting[i].length for i in within) == sum(waiting[i].length for i in chosen):
        return within
    return chosen


def _fill_length(lengths: Iterable[int], room: int) -> list[int]:
    """Subset of `lengths` with the largest sum <= room.

    Bit s of `reach` says that some subset of the lengths so far adds up to s; one shift and one OR of a Python integer add a length
    to all sums at once. The scan ends at the first exact fill, so that mostly the oldest are taken.
    """
    reach, mask = 1, (1 << (room + 1)) - 1
    history, seen = [reach], []
    for length in lengths:
        if reach >> room:
            break
        seen.append(length)
        if length <= room:
            reach |= (reach << length) & mask
        history.append(reach)
    total = reach.bit_length() - 1
    chosen: list[int] = []
    for i in range(len(history) - 2, -1, -1):
        if not history[i] >> total & 1:
            chosen.append(i)
            total -= seen[i]
    assert total == 0, "subset-sum did not come back to 0"
    return chosen[::-1]


def _fill_both(lengths: Sequence[int], patches: Sequence[int], room: int, room_patches: int, is_hard: bool) -> list[int]:
    """Subset with the largest sum of lengths <= room whose patches are <= room_patches.

    `fewest[s]` is the least number of patches with which some subset adds up to s: enough to know exactly which sums are possible.
    not is_hard: if that is not `room`, the subset with the largest sum of all, and the fewest patches.
    """
    # Tiles have equally many patches: counted in tiles the numbers are small, and small numbers make small arrays.
    unit = gcd(*patches) or 1
    sizes, most = [p // unit for p in patches], room_patches // unit
    limit = most if is_hard else max(most, 0) + sum(sizes)
    never = limit + 1
    dtype = next(d for d in (np.uint8, np.uint16, np.uint32, np.uint64) if never + max(sizes, default=0) <= np.iinfo(d).max)
    fewest: npt.NDArray[np.unsignedinteger] = np.full(room + 1, never, dtype=dtype)
    fewest[0] = 0
    improved: list[npt.NDArray[np.bool_] | None] = []
    for length, number in zip(lengths, sizes, strict=True):
        if fewest[room] <= most:
            break
        if length > room or number > limit:
            improved.append(None)
            continue
        taken = fewest[: room + 1 - length] + dtype(number)
        better = np.zeros(room + 1, dtype=np.bool_)
        np.less(taken, fewest[length:], out=better[length:])
        improved.append(better)
        np.minimum(fewest[length:], taken, out=fewest[length:])
    total = int(np.flatnonzero(fewest <= limit)[-1])
    chosen: list[int] = []
    for i in range(len(improved) - 1, -1, -1):
        better_or_none = improved[i]
        if better_or_none is not None and better_or_none[total]:
            chosen.append(i)
            total -= lengths[i]
    assert total == 0, "subset-sum did not come back to 0"
    return chosen[::-1]
