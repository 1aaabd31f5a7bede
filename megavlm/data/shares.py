"""How many samples each source should have given after n draws: an exact piecewise linear function, known before the run.

Weights are given by step, samples are drawn one by one, and a step takes as many samples as fill its packs. So each stretch of
steps becomes a stretch of draws once and for all, by the number of samples that its packs are expected to hold. From then on the
target is a pure function of the number of draws: no layout, no history, no rounding that adds up.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import isfinite, lcm

from megavlm.config.data import MixtureEntry

RAMP_PIECES = 256
"""A linear change moves in at most so many equal pieces; each has the weight of its middle."""

_DIGITS = 1 << 20

UNIT_BITS = 64
"""Targets at the seams between stretches are kept in units of 2^-64 samples."""

NEVER = 1 << 200
"""A draw that does not come."""


class MixtureError(ValueError):
    """Weights or sources that cannot be drawn from."""


@dataclass(frozen=True)
class Source:
    """What the mixture knows of a source."""

    num_rows: int
    mean_length: Fraction = Fraction(1)
    """Mean length of its samples, in the unit of `Rate`; only its ratio to the other sources' matters."""


Rate = Callable[[Mapping[str, Fraction]], Fraction]
"""Shares of the sources -> summed length of the samples that one step takes."""


def exact(number: float) -> Fraction:
    """The decimal number that a person wrote: 0.1 is 1/10, so that 0.1, 0.2 and 0.7 add up to 1."""
    if not isfinite(number):
        raise MixtureError(f"mixture: {number} is no finite number")
    return Fraction(str(number))


@dataclass(frozen=True)
class Piece:
    """Steps with the same weights."""

    start: int
    end: int | None
    """Step behind the last; None: for ever."""
    weights: tuple[int, ...]
    """In proportion."""
    knots: tuple[tuple[tuple[int, ...], Fraction], ...]
    """Weights at which `Rate` is asked, and how much of each answer makes the piece's: its own, or those of its ramp's start, middle or
    end that it lies between."""


def pieces(entries: Sequence[MixtureEntry], rows: Sequence[int]) -> list[Piece]:
    """The steps of a stage, cut where weights change."""
    knots = sorted({step for e in entries if isinstance(e.weight, dict) for step in e.weight} | {0})
    found = []
    for start, end in pairwise([*knots, None]):
        assert start is not None
        before = [weight_at(e, n, start) for e, n in zip(entries, rows, strict=True)]
        # A source that jumps at `end` stays as it is until then.
        after = [weight_at(e, n, end) if end and e.change == "linear" else w for e, n, w in zip(entries, rows, before, strict=True)]
        scale = lcm(*(w.denominator for w in (*before, *after)))
        low, high = (tuple(int(w * scale) for w in weights) for weights in (before, after))
        if end is None or low == high or not any(low) or not any(high):
            # All linear sources that begin (or end) at exactly zero together keep their proportions along the whole way.
            even = low if any(low) else high
            found.append(Piece(start, end, even, ((even, Fraction(1)),)))
            continue
        count = min(RAMP_PIECES, end - start)
        edges = [start + (end - start) * i // count for i in range(count + 1)]
        half = tuple(a + b for a, b in zip(low, high, strict=True))
        for a, b in pairwise(edges):
            # The middle of the steps a .. b - 1, on a ramp that is `whole` long, both doubled.
            at, whole = a + b - 1 - 2 * start, 2 * (end - start)
            weights = tuple(x * whole + (y - x) * at for x, y in zip(low, high, strict=True))
            part = Fraction(2 * at, whole)
            ends = (low, half) if part < 1 else (half, high)
            part %= 1
            found.append(Piece(a, b, weights, tuple(zip(ends, (1 - part, part), strict=True))))
    return found


def weight_at(entry: MixtureEntry, num_rows: int, step: Fraction | int) -> Fraction:
    """Weight of a source at a step. Before the first step that `weight` names it is that step's weight."""
    if entry.repeats is not None:
        return exact(entry.repeats) * num_rows
    if not isinstance(entry.weight, dict):
        return exact(entry.weight or 0)
    knots = sorted(entry.weight)
    place = bisect_right(knots, step)
    before = exact(entry.weight[knots[max(place - 1, 0)]])
    if entry.change == "steps" or place in (0, len(knots)):
        return before
    a, b = knots[place - 1], knots[place]
    return before + (exact(entry.weight[b]) - before) * (step - a) / (b - a)


class Target:
    """T_i(n): samples that source i should have given after n draws; the T_i(n) add up to n.

    Within a stretch T_i(n) = base_i + share_i / whole x (n - start), in whole numbers; one unit is 1 / `unit` sample. A source with a
    cap gives no more from the draw on in which its target reaches it.

    Raises:
        MixtureError: a stretch of steps in which no source has a weight above 0; a weight that is not finite; a cap below one sample.
    """

    def __init__(self, names: Sequence[str], entries: Sequence[MixtureEntry], sources: Sequence[Source], rate: Rate) -> None:
        self.names = tuple(names)
        k = len(names)
        self.unit = max(2 * k - 2, 2) << UNIT_BITS
        self.starts: list[int] = [0]
        self.bases: list[list[int]] = [[0] for _ in names]
        self.shares: list[tuple[int, ...]] = []
        self.wholes: list[int] = []
        self._steps: list[Fraction] = [Fraction(0)]
        self._steps_per_draw: list[Fraction] = []
        self.end_draws: int | None = None
        """Draws after which every source has given all that its cap allows; None: never."""
        self.end_step: float | None = None
        """About the step at which that happens."""
        self.caps = [None if e.max_epochs is None else int(exact(e.max_epochs) * s.num_rows) for e, s in zip(entries, sources, strict=True)]
        for name, cap, entry in zip(names, self.caps, entries, strict=True):
            if cap == 0:
                raise MixtureError(f"mixture.{name}: max_epochs={entry.max_epochs} of its samples is less than one sample")
        steps = pieces(entries, [s.num_rows for s in sources])
        self.has_steps = len(steps) > 1
        """Whether weights change over the steps."""
        self._build(steps, sources, rate)

    def _build(self, steps: list[Piece], sources: Sequence[Source], rate: Rate) -> None:
        answers: dict[tuple[int, ...], Fraction] = {}
        # Whole numbers: a few digits are enough for an estimate, and there may be many pieces.
        means = [round(s.mean_length * _DIGITS) for s in sources]
        live = [True] * len(self.names)
        for piece in steps:
            if not any(piece.weights):
                steps_named = f"from step {piece.start} on" if piece.end is None else f"in steps {piece.start} to {piece.end - 1}"
                raise MixtureError(f"mixture: {steps_named} no source has a weight above 0: give one of them a weight there")
            for knot, _ in piece.knots:
                if knot not in answers:
                    answers[knot] = rate({n: Fraction(w, sum(knot)) for n, w in zip(self.names, knot, strict=True)})
            length = round(sum(answers[knot] * share for knot, share in piece.knots) * _DIGITS)
            while True:
                shares = tuple(w if alive else 0 for w, alive in zip(piece.weights, live, strict=True))
                if not any(shares):
                    self.end_draws, self.end_step = self.starts[-1], float(self._steps[-1])
                    return
                mean = sum(w * m for w, m in zip(shares, means, strict=True))
                per_step = Fraction(max(1, _DIGITS * length * sum(shares) // mean), _DIGITS)
                if not self._stretch(piece, shares, per_step, live):
                    break

    def _stretch(self, piece: Piece, shares: tuple[int, ...], per_step: Fraction, live: list[bool]) -> bool:
        """Add the draws up to the piece's end or to the next cap; whether it was a cap."""
        whole = sum(shares)
        start = self.starts[-1]
        end = NEVER if piece.end is None else start + max(0, round((piece.end - self._steps[-1]) * per_step))
        reaches = [
            start + max(1, -(-(cap * self.unit - base[-1]) * whole // (self.unit * share)))
            for cap, base, share, alive in zip(self.caps, self.bases, shares, live, strict=True)
            if cap is not None and alive and share
        ]
        capped = min(reaches, default=NEVER)
        if capped > end:
            self._append(end, shares, whole, per_step, piece.end)
            return False
        if capped == NEVER:
            self._append(NEVER, shares, whole, per_step, None)
            return False
        self._append(capped - 1, shares, whole, per_step, None)
        last = self._fill_one_draw(shares, live)
        if last is not None:
            self._append(capped, last, self.unit, per_step, None)
        return True

    def _fill_one_draw(self, shares: Sequence[int], live: list[bool]) -> tuple[int, ...] | None:
        """Shares, in units, of the draw in which sources reach their caps: what they cannot take goes to the others. None: together
        they cannot take a whole sample any more."""
        given = [0] * len(shares)
        room = [None if cap is None else cap * self.unit - base[-1] for cap, base in zip(self.caps, self.bases, strict=True)]
        rest = self.unit
        while rest and any(s for s, alive in zip(shares, live, strict=True) if alive):
            parts = _split(rest, [s if alive else 0 for s, alive in zip(shares, live, strict=True)])
            rest = 0
            for i, part in enumerate(parts):
                given[i] += part
                limit = room[i]
                if live[i] and shares[i] and limit is not None and given[i] >= limit:
                    rest, given[i], live[i] = rest + given[i] - limit, limit, False
        return None if rest else tuple(given)

    def _append(self, end: int, shares: tuple[int, ...], whole: int, per_step: Fraction, step: int | None) -> None:
        start = self.starts[-1]
        if end <= start:
            if step is not None:
                self._steps[-1] = Fraction(step)
            return
        self.shares.append(shares)
        self.wholes.append(whole)
        self._steps_per_draw.append(1 / per_step)
        if end == NEVER:
            return
        passed = self._steps[-1] + (end - start) / per_step
        self._steps.append(Fraction(step) if step is not None else Fraction(round(passed * _DIGITS**2), _DIGITS**2))
        grown = _split((end - start) * self.unit, shares)
        for base, more in zip(self.bases, grown, strict=True):
            base.append(base[-1] + more)
        self.starts.append(end)

    def first_at_least(self, source: int, level: int) -> int:
        """The first n with T_source(n) >= `level` units (more than 0); NEVER if there is none."""
        stretch = bisect_left(self.bases[source], level) - 1
        return self._reach(source, stretch, level, 0)

    def first_above(self, source: int, level: int) -> int:
        """The first n with T_source(n) > `level` units; NEVER if there is none."""
        stretch = bisect_right(self.bases[source], level) - 1
        return self._reach(source, stretch, level, 1)

    def _reach(self, source: int, stretch: int, level: int, above: int) -> int:
        if stretch == len(self.shares) or not (share := self.shares[stretch][source]):
            return NEVER
        distance, per_draw = (level - self.bases[source][stretch]) * self.wholes[stretch], self.unit * share
        draws = distance // per_draw + 1 if above else -(-distance // per_draw)
        # Seams are rounded to units, so that a level may lie between the last draw and the seam.
        last = self.starts[stretch + 1] if stretch + 1 < len(self.starts) else NEVER
        return min(self.starts[stretch] + draws, last)

    def at(self, draws: int) -> dict[str, Fraction]:
        """Samples that each source should have given after so many draws."""
        stretch = min(bisect_right(self.starts, draws), len(self.shares)) - 1
        done = Fraction(draws - self.starts[stretch], self.wholes[stretch])
        return {
            name: Fraction(base[stretch], self.unit) + share * done
            for name, base, share in zip(self.names, self.bases, self.shares[stretch], strict=True)
        }

    def step_at(self, draws: int) -> float:
        """About the step that takes draw number `draws`: the inverse of what turned steps into draws."""
        stretch = min(bisect_right(self.starts, draws), len(self.shares)) - 1
        return float(self._steps[stretch] + (draws - self.starts[stretch]) * self._steps_per_draw[stretch])


def _split(amount: int, weights: Sequence[int]) -> list[int]:
    """`amount` divided in proportion to `weights`, in whole numbers that add up to it (largest remainders)."""
    whole = sum(weights)
    parts = [divmod(amount * weight, whole) for weight in weights]
    result = [quotient for quotient, _ in parts]
    for i in sorted(range(len(parts)), key=lambda i: (-parts[i][1], i))[: amount - sum(result)]:
        result[i] += 1
    return result
