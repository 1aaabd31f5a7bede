"""Which rows of a packed sequence each context rank holds: the arithmetic of the split, without tensors.

Three ways to cut a pack of segments over C ranks:

- zigzag: every segment is cut into 2 x C equal chunks, and rank r holds chunk r and its mirror image 2C - 1 - r. Under a causal mask each
  rank then has the same number of query-key pairs in every segment (the "dual chunk swap" of Transformer Engine's context parallelism,
  transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py).
- contiguous: every segment is cut into C equal chunks, and rank r holds chunk r. The last rank has the most pairs.
- pack: the whole pack is cut into 2 x C equal chunks, as if it were one segment. Segments shorter than a chunk stay whole on one rank, so
  few keys travel; how even the work is depends on where long segments happen to lie.

A length that the chunks do not divide is padded at its end. Pads exist only as rows of a rank: they belong to no place of the sequence, so
plans, batches, positions and losses are the same in every layout. With zigzag and contiguous each segment has its own pads (the meaning of
`cu_seqlens_q_padded` in Transformer Engine and megatron-core); with pack they are behind the last.

Shape legend: S rows of the packed sequence, L rows of one rank with its pads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from megavlm.config.parallel import ContextSplit, ParallelConfig


class Span(NamedTuple):
    """Rows of one segment that stand side by side in the sequence and on a rank."""

    place: int
    """Row of the rank that is the first of them."""
    row: int
    """Row of the sequence that is the first of them."""
    length: int
    segment: int


class ContextWork(NamedTuple):
    """What one layer's attention costs each context rank."""

    pairs: tuple[int, ...]
    """Query-key pairs of each rank under a causal mask."""
    real_rows: tuple[int, ...]
    """Rows of each rank that are no pads."""
    num_rows: int
    """L: rows of each rank, pads included."""
    received: tuple[int, ...]
    """Rows of other ranks whose keys and values each rank needs."""

    @property
    def imbalance(self) -> float:
        """Pairs of the busiest rank over the mean; 1 is even. 1 for a pack without rows."""
        return max(self.pairs) * len(self.pairs) / sum(self.pairs) if sum(self.pairs) else 1.0

    @property
    def pads(self) -> int:
        """Rows over all ranks that belong to no place of the sequence."""
        return self.num_rows * len(self.pairs) - sum(self.real_rows)


@dataclass(frozen=True)
class ContextLayout:
    """How a packed sequence lies on its context ranks; get one from `context_layout`."""

    lengths: tuple[int, ...]
    """Of the segments."""
    split: ContextSplit
    size: int
    num_rows: int
    """L: rows of every rank, pads included."""
    padded_lengths: tuple[int, ...]
    """Rows that each segment takes up over all ranks; their sum is L x size. With the split `pack` all pads count to the last."""
    spans: tuple[tuple[Span, ...], ...]
    """Of each rank, in the order of its rows. What no span covers is a pad."""

    @property
    def total(self) -> int:
        """S: rows of the sequence."""
        return sum(self.lengths)

    def keys(self, rank: int, whole: frozenset[int] | None = frozenset()) -> tuple[tuple[int, int], ...]:
        """(first row of the sequence, number) of the keys that each span of a rank sees, causal order within its segment.

        In the segments `whole` (None: in all) every row sees the whole segment.
        """
        bounds = [0, *accumulate(self.lengths)]
        ends = ((s, bounds[s.segment + 1] if whole is None or s.segment in whole else s.row + s.length) for s in self.spans[rank])
        return tuple((bounds[span.segment], end - bounds[span.segment]) for span, end in ends)

    def work(self) -> ContextWork:
        """Pairs, rows and keys of each rank under a causal mask."""
        pairs, real, received = [], [], []
        for rank, spans in enumerate(self.spans):
            count, needed = 0, [0] * len(self.lengths)
            for span, (_, num_keys) in zip(spans, self.keys(rank), strict=True):
                # Queries see num_keys - length + 1, ..., num_keys keys.
                count += span.length * (2 * num_keys - span.length + 1) // 2
                needed[span.segment] = max(needed[span.segment], num_keys)
            pairs.append(count)
            real.append(sum(span.length for span in spans))
            # Every row of a rank is among the keys that it sees.
            received.append(sum(needed) - real[-1])
        return ContextWork(tuple(pairs), tuple(real), self.num_rows, tuple(received))


@lru_cache(maxsize=256)
def context_layout(lengths: tuple[int, ...], split: ContextSplit, size: int, multiple: int = 1) -> ContextLayout:
    """Cut segments of `lengths` over `size` ranks, each with the same number of rows, a multiple of `multiple`.

    `multiple` is the tensor-parallel size under sequence parallelism, which cuts a rank's rows again; rows that it makes necessary are pads
    of the longest segment, where they disturb the balance least. A segment shorter than its chunks leaves pads on some ranks.

    Raises ValueError for a negative length, or a size or multiple below 1.
    """
    bounds = [0, *accumulate(lengths)]
    per_rank, chunks = _chunks(lengths, split, size, multiple)
    blocks = list(zip(bounds, lengths, strict=False)) if split != "pack" else [(0, bounds[-1])]
    spans = tuple(tuple(_spans(rank, size, split, blocks, chunks, bounds)) for rank in range(size))
    num_rows = per_rank * sum(chunks)
    if split == "pack":
        padded = (*lengths[:-1], lengths[-1] + num_rows * size - bounds[-1]) if lengths else ()
    else:
        padded = tuple(per_rank * size * chunk for chunk in chunks)
    return ContextLayout(lengths, split, size, num_rows, padded, spans)


def rows_of_rank(lengths: Sequence[int], split: ContextSplit, size: int, multiple: int = 1) -> int:
    """L of `context_layout`, without the layout."""
    per_rank, chunks = _chunks(lengths, split, size, multiple)
    return per_rank * sum(chunks)


def most_rows(num_tokens: int, num_segments: int, parallel: ParallelConfig) -> int:
    """Rows of a context rank for any microbatch of so many tokens in so many segments, pads included."""
    if parallel.context == 1:
        return num_tokens
    chunks = parallel.context if parallel.context_split == "contiguous" else 2 * parallel.context
    padded = num_tokens + (chunks - 1) * (1 if parallel.context_split == "pack" else num_segments)
    unit = math.lcm(1 if parallel.context_split == "contiguous" else 2, parallel.tensor if parallel.sequence else 1)
    return math.ceil(padded / parallel.context / unit) * unit


def _chunks(lengths: Sequence[int], split: ContextSplit, size: int, multiple: int) -> tuple[int, list[int]]:
    """(chunks that a rank has of each block, rows of a chunk of each block); blocks are the segments, or the whole pack."""
    if size < 1 or multiple < 1 or min(lengths, default=0) < 0:
        raise ValueError(f"segments of {list(lengths)} rows cannot be split over {size} context ranks with rows a multiple of {multiple}")
    per_rank = 1 if split == "contiguous" else 2
    blocks = [sum(lengths)] if split == "pack" else lengths
    chunks = [-(-length // (per_rank * size)) for length in blocks]
    longest = max(range(len(blocks)), key=lambda number: blocks[number], default=None)
    if longest is not None:
        while per_rank * sum(chunks) % multiple:
            chunks[longest] += 1
    return per_rank, chunks


def _spans(
    rank: int, size: int, split: ContextSplit, blocks: Sequence[tuple[int, int]], chunks: Sequence[int], bounds: Sequence[int]
) -> list[Span]:
    """Rows of one rank, cut where segments end."""
    numbers = (rank,) if split == "contiguous" else (rank, 2 * size - 1 - rank)
    found: list[Span] = []
    place = 0
    for block, ((start, length), chunk) in enumerate(zip(blocks, chunks, strict=True)):
        for number in numbers:
            low, high = start + min(number * chunk, length), start + min((number + 1) * chunk, length)
            segments = [block] if split != "pack" else range(len(bounds) - 1)
            for segment in segments:
                first, last = max(low, bounds[segment]), min(high, bounds[segment + 1])
                if first < last:
                    found.append(Span(place + first - low, first, last - first, segment))
            place += chunk
    return found
