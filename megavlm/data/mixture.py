"""Sample order: which source gives the next sample, and which of its rows.

Both are pure functions of (seed, weights, number of draws so far), so that the state of an endless stream is one counter a source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from fractions import Fraction
from math import lcm
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class MixtureError(ValueError):
    """Weights or sources that cannot be drawn from."""


class Draw(NamedTuple):
    """One sample of the endless stream."""

    source: str
    number: int
    """How many samples of this source came before; epoch = number // rows."""
    row: int
    """Row in the source's index."""
    ordinal: int
    """How many samples of all sources came before."""


class SourceOrder:
    """The endless order of one source: every epoch is another permutation of its rows, each row exactly once.

    The permutation is the argsort of 64-bit words of PCG64 seeded by (seed, source name, epoch). It uses bit-generator output
    alone, whose stream NumPy keeps stable over versions (NEP 19), which its `permutation` does not promise: a cursor stays valid
    after an upgrade. Adding or removing another source does not change this one's order.

    Memory: 8 bytes a row for the epochs in use.

    Raises:
        MixtureError: the source has no row.
    """

    def __init__(self, name: str, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise MixtureError(f"source {name!r} has no sample, so none can be drawn: remove it from the mixture or set its weight to 0")
        self.name, self.num_rows, self.seed = name, num_rows, seed
        self._permutations: dict[int, npt.NDArray[np.int64]] = {}

    def row(self, number: int) -> int:
        """Row of the source's `number`-th draw (counted from 0, over all epochs); random access."""
        epoch, position = divmod(number, self.num_rows)
        permutation = self._permutations.get(epoch)
        if permutation is None:
            permutation = self._shuffle(epoch)
            # Samples of the epoch before may still wait in the packer's window; older ones are made again when asked for.
            self._permutations = {e: p for e, p in self._permutations.items() if e == epoch - 1}
            self._permutations[epoch] = permutation
        return int(permutation[position])

    def _shuffle(self, epoch: int) -> npt.NDArray[np.int64]:
        key = hashlib.sha256(f"megavlm order 1|{self.seed}|{self.name}|{epoch}".encode()).digest()
        words = np.random.PCG64(int.from_bytes(key, "little")).random_raw(self.num_rows)
        return np.argsort(words, kind="stable")


class Mixture:
    """Draws sources in proportion to their weights, deterministically, never one sample or more from the exact share.

    The choice is Tijdeman's ("The chairman assignment problem", Discrete Mathematics 32, 1980): of the sources whose deficit
    (share due after this draw - samples given) is at least 1/(2k-2), the one that would first fall 1 - 1/(2k-2) behind. For k sources
    no count is ever further than 1 - 1/(2k-2) from weight x draws. The plain rule of the largest deficit has no
    such bound: with weights 1, 5, 13, 56, 56 it is 1.07 samples off after 68 draws. Weights are exact fractions: no float drift.

    Raises:
        MixtureError: no weight above 0, a negative or infinite weight, or a weight above 0 on a source without samples.
    """

    def __init__(
        self, weights: Mapping[str, float], num_rows: Mapping[str, int], seed: int, counters: Mapping[str, int] | None = None
    ) -> None:
        used = {name: weight for name, weight in sorted(weights.items()) if weight != 0}
        for name, weight in used.items():
            if not 0 < weight < float("inf"):
                raise MixtureError(f"mixture weight of {name!r} is {weight}: it must be a finite number, 0 or more")
        if not used:
            raise MixtureError("mixture has no source with a weight above 0")
        self.sources: tuple[str, ...] = tuple(used)
        self.orders = {name: SourceOrder(name, num_rows[name], seed) for name in used}
        fractions = [Fraction(weight) for weight in used.values()]
        common = lcm(*(f.denominator for f in fractions))
        self._shares = [int(f * common) for f in fractions]
        self._whole = sum(self._shares)
        self._counts = [int((counters or {}).get(name, 0)) for name in used]
        self._draws = sum(self._counts)

    @property
    def counters(self) -> dict[str, int]:
        """Samples drawn from each source so far: the whole state."""
        return dict(zip(self.sources, self._counts, strict=True))

    @property
    def num_draws(self) -> int:
        """Samples drawn from all sources so far."""
        return self._draws

    @property
    def epochs(self) -> dict[str, float]:
        """Passes over each source so far."""
        return {name: count / self.orders[name].num_rows for name, count in self.counters.items()}

    def draw(self) -> Draw:
        """The next sample."""
        chosen = self._choose()
        name, number = self.sources[chosen], self._counts[chosen]
        drawn = Draw(name, number, self.orders[name].row(number), self._draws)
        self._counts[chosen] += 1
        self._draws += 1
        return drawn

    def row(self, source: str, number: int) -> int:
        """Row of the `number`-th draw of `source`."""
        return self.orders[source].row(number)

    def _choose(self) -> int:
        """Index of the next source. Everything is scaled by the sum of the weights, times 2k-2: exact integers."""
        if len(self.sources) == 1:
            return 0
        scale = 2 * len(self.sources) - 2
        best, best_room = -1, 0
        for i, (share, count) in enumerate(zip(self._shares, self._counts, strict=True)):
            deficit = scale * (share * (self._draws + 1) - count * self._whole)
            if deficit < self._whole:
                continue
            room = (scale - 1) * self._whole - deficit
            # room / share = draws until this source is too far behind; compare fractions by their cross products.
            if best < 0 or room * self._shares[best] < best_room * share:
                best, best_room = i, room
        # The deficits add up to 1, so that one of k is at least 1/k >= 1/(2k-2).
        assert best >= 0, "no source is due"
        return best
