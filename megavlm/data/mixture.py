"""Sample order: which source gives the next sample, and which of its rows.

Both are pure functions of (seed, mixture, number of draws so far), so that the state of an endless stream is one counter a source.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple

from megavlm.config.data import MixtureEntry
from megavlm.data.order import OrderError, SourceOrder
from megavlm.data.shares import NEVER, MixtureError, Rate, Source, Target

__all__ = ["Draw", "Mixture", "MixtureEnd", "MixtureError", "Source", "SourceOrder"]


class MixtureEnd(MixtureError):
    """Every source has given all that its max_epochs allows."""


class Draw(NamedTuple):
    """One sample of the stream."""

    source: str
    number: int
    """How many samples of this source came before; epoch = number // rows."""
    row: int
    """Row in the source's index."""
    ordinal: int
    """How many samples of all sources came before."""


class Mixture:
    """Draws sources so that no count is ever one sample or more from its target (`megavlm.data.shares.Target`).

    The choice is Tijdeman's ("The chairman assignment problem", Discrete Mathematics 32, 1980), which holds for any shares as long as
    they are known ahead: with k sources and c = 1/(2k-2), sample j of source i may be given from the first draw with T_i >= j + c on,
    and has to be before T_i exceeds j + 1 - c; of those that may, the one that has to soonest is given. Every one is in time, and no
    count is further than 1 - c from its target. The plain rule of the largest deficit has no such bound: with weights 1, 5,
    13, 56, 56 it is 1.07 samples off after 68 draws. All numbers are whole: no float drift.

    `entries`: each source's part in the stage. `sources`: its rows and mean length. `rate`: summed length of the samples of one step,
    for given shares of the sources (asked only where weights change). `counters`: what `counters` said; the stream goes on there.

    Raises:
        MixtureError: no weight above 0 at some step, a source without rows, a cap below one sample.
    """

    def __init__(
        self,
        entries: Mapping[str, MixtureEntry],
        sources: Mapping[str, Source],
        seed: int,
        counters: Mapping[str, int] | None = None,
        rate: Rate = lambda shares: Fraction(1),
    ) -> None:
        self.sources: tuple[str, ...] = tuple(sorted(name for name, entry in entries.items() if entry.is_used))
        if not self.sources:
            raise MixtureError("mixture has no source with a weight above 0")
        try:
            self.orders = {name: SourceOrder(name, sources[name].num_rows, seed) for name in self.sources}
        except OrderError as error:
            raise MixtureError(str(error)) from None
        self.target = Target(self.sources, [entries[name] for name in self.sources], [sources[name] for name in self.sources], rate)
        self._margin = self.target.unit // max(2 * len(self.sources) - 2, 2)
        self._counts = [int((counters or {}).get(name, 0)) for name in self.sources]
        self._draws = sum(self._counts)
        # (deadline, source) of samples that may be given now; (release, source, deadline) of those that may not yet.
        self._ready: list[tuple[int, int]] = []
        self._later: list[tuple[int, int, int]] = []
        for i in range(len(self.sources)):
            self._queue(i)

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
        """The next sample.

        Raises:
            MixtureEnd: every source has reached its cap.
        """
        ordinal = self._draws
        if self.target.end_draws is not None and ordinal >= self.target.end_draws:
            raise MixtureEnd(f"all sources have reached mixture.*.max_epochs after {ordinal} samples: {self.counters}")
        later, ready = self._later, self._ready
        while later and later[0][0] <= ordinal + 1:
            _, source, deadline = heapq.heappop(later)
            heapq.heappush(ready, (deadline, source))
        # The deficits add up to 1, so that one of k is at least 1/k >= 1/(2k-2).
        assert ready, "no source is due"
        deadline, chosen = heapq.heappop(ready)
        assert deadline > ordinal, "a sample is too late"
        number = self._counts[chosen]
        self._counts[chosen] += 1
        self._draws += 1
        self._queue(chosen)
        name = self.sources[chosen]
        return Draw(name, number, self.orders[name].row(number), ordinal)

    def row(self, source: str, number: int) -> int:
        """Row of the `number`-th draw of `source`."""
        return self.orders[source].row(number)

    def _queue(self, source: int) -> None:
        """Reckon when the source's next sample may and has to be given."""
        level = self._counts[source] * self.target.unit
        release = self.target.first_at_least(source, level + self._margin)
        if release < NEVER:
            deadline = self.target.first_above(source, level + self.target.unit - self._margin)
            heapq.heappush(self._later, (release, source, deadline))
