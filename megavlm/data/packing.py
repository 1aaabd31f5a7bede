"""Streaming subset-sum packing: which samples share a sequence.

A window of samples waits. The oldest seeds each pack; an exact subset-sum over the waiting lengths, oldest first, fills the rest of
the token budget, under a second hard budget on patches (vision work). Whenever some of the samples looked at add up to the budget
exactly, they are found: with a window of 256 and real length mixes that is nearly every time.

How long a sample can wait: every pack takes the oldest, and a sample joins the window behind at most `window - 1` others, so that it
leaves with the `window`-th pack formed after it came, at the latest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

LOOK_AHEAD_PATCHES = 64
"""Waiting samples that are tried where the patch budget decides: that search costs some 20 times the other one a sample."""


class PackingError(ValueError):
    """A sample or a budget with which no pack can be formed."""


@dataclass(frozen=True)
class Budget:
    """Hard limits of one pack.

    Raises:
        PackingError: a budget below 1.
    """

    length: int
    """Tokens (images, for vision_classification)."""
    patches: int | None = None
    """None: no limit."""

    def __post_init__(self) -> None:
        if self.length < 1 or (self.patches is not None and self.patches < 1):
            raise PackingError(f"budgets of a pack must be at least 1: {self.length} tokens, {self.patches} patches")


class Waiting(NamedTuple, Generic[T]):
    """One sample that waits for a place."""

    length: int
    patches: int
    sample: T
    """Whatever names it."""


class Packer(Generic[T]):
    """Forms packs from an endless stream, one at a time.

    `window` samples wait for a place. `packing=False`: one sample a pack, in order, nothing waits.

    Its state is `waiting`, oldest first: put it back and the same packs follow.
    """

    def __init__(self, budget: Budget, window: int, *, packing: bool = True, waiting: Sequence[Waiting[T]] = ()) -> None:
        if window < 1:
            raise PackingError(f"the packer's window must hold at least 1 sample, not {window}")
        self.budget, self.window, self.packing = budget, window, packing
        self.waiting: list[Waiting[T]] = list(waiting)

    def next_pack(self, draw: Callable[[], Waiting[T]]) -> list[Waiting[T]]:
        """The next pack, in order of arrival; `draw` gives the next sample of the stream and is called until the window is full.

        Raises:
            PackingError: a sample is longer than the budget, has more patches, or has no length.
        """
        if not self.packing:
            return [self._checked(draw())]
        while len(self.waiting) < self.window:
            self.waiting.append(self._checked(draw()))
        chosen = choose(self.waiting, self.budget)
        pack = [self.waiting[i] for i in chosen]
        taken = set(chosen)
        self.waiting = [w for i, w in enumerate(self.waiting) if i not in taken]
        return pack

    def _checked(self, new: Waiting[T]) -> Waiting[T]:
        if not 1 <= new.length <= self.budget.length:
            raise PackingError(f"sample {new.sample}: its length of {new.length} is not between 1 and the budget of {self.budget.length}")
        if new.patches < 0 or (self.budget.patches is not None and new.patches > self.budget.patches):
            raise PackingError(f"sample {new.sample}: its {new.patches} patches are not between 0 and the budget of {self.budget.patches}")
        return new


def choose(waiting: Sequence[Waiting[T]], budget: Budget) -> list[int]:
    """Places in `waiting`, ascending and starting with 0 (the oldest), whose lengths come closest to the budget.

    Exact: no other subset that holds the oldest and keeps both budgets is longer. Where the longest breaks the patch budget,
    "other" are the subsets of the LOOK_AHEAD_PATCHES oldest.
    """
    room = budget.length - waiting[0].length
    lengths = [w.length for w in waiting[1:]]
    chosen = _fill_length(lengths, room)
    if budget.patches is not None:
        patches = [w.patches for w in waiting[1:]]
        room_patches = budget.patches - waiting[0].patches
        if sum(patches[i] for i in chosen) > room_patches:
            chosen = _fill_both(lengths[:LOOK_AHEAD_PATCHES], patches[:LOOK_AHEAD_PATCHES], room, room_patches)
    return [0] + [i + 1 for i in chosen]


def _fill_length(lengths: Sequence[int], room: int) -> list[int]:
    """Subset of `lengths` with the largest sum <= room.

    Bit s of `reach` says that some subset of the lengths so far adds up to s; one shift and one OR of a Python integer add a length
    to all sums at once. The scan ends at the first exact fill, so that mostly the oldest are taken.
    """
    reach, mask = 1, (1 << (room + 1)) - 1
    history = [reach]
    for length in lengths:
        if reach >> room:
            break
        if length <= room:
            reach |= (reach << length) & mask
        history.append(reach)
    total = reach.bit_length() - 1
    chosen: list[int] = []
    for i in range(len(history) - 2, -1, -1):
        if not history[i] >> total & 1:
            chosen.append(i)
            total -= lengths[i]
    assert total == 0, "subset-sum did not come back to 0"
    return chosen[::-1]


def _fill_both(lengths: Sequence[int], patches: Sequence[int], room: int, room_patches: int) -> list[int]:
    """Subset with the largest sum of lengths <= room whose patches are <= room_patches.

    `fewest[s]` is the least number of patches with which some subset adds up to s: enough to know exactly which sums are possible.
    """
    # Small numbers make small arrays; more patches than any sum may have mark a sum that no subset reaches.
    dtype = np.int16 if room_patches < 2**14 else np.int64
    never = room_patches + 1
    fewest: npt.NDArray[np.signedinteger] = np.full(room + 1, never, dtype=dtype)
    fewest[0] = 0
    improved: list[npt.NDArray[np.bool_] | None] = []
    for length, number in zip(lengths, patches, strict=True):
        if fewest[room] <= room_patches:
            break
        if length > room or number > room_patches:
            improved.append(None)
            continue
        taken = fewest[: room + 1 - length] + dtype(number)
        better = np.zeros(room + 1, dtype=np.bool_)
        np.less(taken, fewest[length:], out=better[length:])
        improved.append(better)
        np.minimum(fewest[length:], taken, out=fewest[length:])
    total = int(np.flatnonzero(fewest <= room_patches)[-1])
    chosen: list[int] = []
    for i in range(len(improved) - 1, -1, -1):
        better_or_none = improved[i]
        if better_or_none is not None and better_or_none[total]:
            chosen.append(i)
            total -= lengths[i]
    assert total == 0, "subset-sum did not come back to 0"
    return chosen[::-1]
