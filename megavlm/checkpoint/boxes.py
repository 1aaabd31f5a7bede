"""Boxes: rectangular parts of tensors. What a rank holds of a tensor, and a chunk of a checkpoint, are boxes.

A box is an offset and sizes, one number a dimension. A stretch of a flattened tensor, such as a distributed optimizer's share of a
parameter, is a few boxes: part of a row, whole rows, part of a row. Nothing here knows files or ranks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import product
from typing import NamedTuple

Numbers = tuple[int, ...]


class Box(NamedTuple):
    """A part of a tensor."""

    offset: Numbers
    sizes: Numbers

    @property
    def numel(self) -> int:
        """Elements in it."""
        return math.prod(self.sizes)

    def meet(self, other: Box) -> Box | None:
        """What both have in common; None when that is nothing."""
        low = tuple(map(max, self.offset, other.offset))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(*self, *other, strict=True))
        sizes = tuple(h - lo for h, lo in zip(high, low, strict=True))
        return Box(low, sizes) if all(n > 0 for n in sizes) else None

    def inside(self, outer: Box) -> tuple[slice, ...]:
        """Slices of `outer`'s elements that are this box's."""
        return tuple(slice(o - base, o - base + n) for o, n, base in zip(self.offset, self.sizes, outer.offset, strict=True))


class Strip(NamedTuple):
    """A box of a strided view, and where its first element lies in the storage that is viewed."""

    box: Box
    start: int


def cut(sizes: Numbers, strides: Numbers, start: int, low: int, high: int) -> Iterator[Strip]:
    """The boxes of a view whose elements lie in [low, high) of its storage.

    The view has `sizes` and `strides`, and its first element lies at `start`; its dimensions must not interleave in the storage.
    """
    if math.prod(sizes) == 0:
        return
    end = start + 1 + sum((n - 1) * s for n, s in zip(sizes, strides, strict=True))
    if low <= start and end <= high:
        yield Strip(Box((0,) * len(sizes), sizes), start)
        return
    if end <= low or high <= start:
        return
    # Some of the rows (indices of the first dimension) are inside; of those at both ends a part may be.
    row, stride = end - start - (sizes[0] - 1) * strides[0], strides[0]
    assert stride >= row or sizes[0] == 1, "dimensions that interleave"
    first = min(max(-(-(low - start) // stride), 0), sizes[0]) if stride else 0
    last = min(max((high - row - start) // stride + 1, first), sizes[0]) if stride else int(low <= start and start + row <= high)
    if last > first:
        yield Strip(Box((first, *(0,) * (len(sizes) - 1)), (last - first, *sizes[1:])), start + first * stride)
    for index in {max(first - 1, 0), min(last, sizes[0] - 1)} - set(range(first, last)):
        for (offset, inner), at in cut(sizes[1:], strides[1:], start + index * stride, low, high):
            yield Strip(Box((index, *offset), (1, *inner)), at)


def tile_exactly(whole: Numbers, boxes: Iterable[Box]) -> bool:
    """Does every element of a tensor of shape `whole` lie in exactly one of the boxes?

    A box's corners, signed by parity, are the mixed difference of its indicator function, which nothing else has. So the boxes tile the
    tensor if and only if the sum of their signed corners is that of the tensor's own.
    """

    def corners(box: Box) -> Iterator[tuple[Numbers, int]]:
        for upper in product((0, 1), repeat=len(box.sizes)):
            yield tuple(o + n * u for o, n, u in zip(*box, upper, strict=True)), (-1) ** sum(upper)

    total: Counter[Numbers] = Counter()
    for box in boxes:
        if box.numel:
            for corner, sign in corners(box):
                total[corner] += sign
    for corner, sign in corners(Box((0,) * len(whole), whole)) if math.prod(whole) else ():
        total[corner] -= sign
    return not any(total.values())
