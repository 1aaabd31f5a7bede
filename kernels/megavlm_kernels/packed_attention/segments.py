"""Where the segments of a packed sequence lie.

Shape legend: L query rows, S key rows, R and R' query and key rows of one segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch

from megavlm_kernels.transfer import to_device

MaskOf = Callable[[int, int | None], torch.Tensor]
"""(number of the segment, window) -> bool (R, R'): True where the query sees the key."""


@dataclass(frozen=True)
class Bounds:
    """The same as tensors, as CUDA kernels take them."""

    cu_seqlens_q: torch.Tensor
    """int32 (segments + 1,)."""
    cu_seqlens_k: torch.Tensor
    key_rows: torch.Tensor | None
    """int64: rows of the keys, segment after segment; None when they lie so already."""


@dataclass
class Segments:
    """Queries of segments end to end, and the keys that each sees.

    Keys lie end to end too, unless `key_starts` says where: several segments may then share keys (context parallelism). With causal
    attention the last query of a segment is aligned to its last key. Built once for all layers: tensors and masks are kept.
    """

    query_lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    key_starts: tuple[int, ...] | None = None
    masked: frozenset[int] = frozenset()
    """Segments whose rows see each other by `masks`, not by order."""
    masks: MaskOf | None = None
    """Needed for `masked`; used for windows too, where it is given."""
    _bounds: dict[torch.device, Bounds] = field(default_factory=dict, repr=False)
    _orders: dict[tuple[int, int, int | None, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Segments:
        """Self-attention of segments of these lengths."""
        return cls(tuple(lengths), tuple(lengths))

    def __post_init__(self) -> None:
        if len(self.query_lengths) != len(self.key_lengths) or (self.key_starts and len(self.key_starts) != len(self.key_lengths)):
            raise ValueError(f"{len(self.query_lengths)} segments of queries, {len(self.key_lengths)} of keys")
        if self.masked and self.masks is None:
            raise ValueError("masked segments need `masks`")

    @cached_property
    def longest_query(self) -> int:
        return max(self.query_lengths, default=0)

    @cached_property
    def longest_key(self) -> int:
        return max(self.key_lengths, default=0)

    @cached_property
    def _sums(self) -> tuple[int, int]:
        return sum(self.query_lengths), sum(self.key_lengths)

    @cached_property
    def query_starts(self) -> tuple[int, ...]:
        """First row of each segment, and the number of all rows."""
        return tuple(accumulate(self.query_lengths, initial=0))

    @cached_property
    def is_square(self) -> bool:
        """Every segment has as many keys as queries."""
        return self.query_lengths == self.key_lengths

    @cached_property
    def is_uniform(self) -> bool:
        """All segments are of one length, apart and without masks of their own: one batch."""
        one = len(set(zip(self.query_lengths, self.key_lengths, strict=True))) == 1
        return one and self.key_starts is None and not self.masked

    @cached_property
    def fits_causal(self) -> bool:
        """No query of a segment would come before its first key."""
        return all(q <= k for q, k in zip(self.query_lengths, self.key_lengths, strict=True))

    def check(self, query_rows: int, key_rows: int) -> None:
        """Raises ValueError when the segments are not those of a query and key of so many rows."""
        queries, keys = self._sums
        if queries != query_rows or (keys != key_rows and self.key_starts is None):
            raise ValueError(f"segments of {queries} queries and {keys} keys, but {query_rows} rows of queries and {key_rows} of keys")

    def bounds(self, device: torch.device) -> Bounds:
        """Bounds on `device`, copied there once."""
        found = self._bounds.get(device)
        if found is None:
            # Kernels differ in what they make of a segment without a row.
            pairs = [pair for pair in zip(self.query_lengths, self.key_lengths, strict=True) if pair != (0, 0)]
            sums = [torch.tensor([0, *accumulate(pair[side] for pair in pairs)], dtype=torch.int32) for side in (0, 1)]
            rows = None
            if self.key_starts is not None:
                ranges = [torch.arange(s, s + n) for s, n in zip(self.key_starts, self.key_lengths, strict=True)]
                rows = to_device(torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64), device)
            found = self._bounds[device] = Bounds(to_device(sums[0], device), to_device(sums[1], device), rows)
        return found

    def mask(self, segment: int, window: int | None, device: torch.device) -> torch.Tensor:
        """bool (R, R') of a segment under causal order, the window and its own mask."""
        if self.masks is not None:
            return self.masks(segment, window)
        key = (self.query_lengths[segment], self.key_lengths[segment], window, device)
        found = self._orders.get(key)
        if found is None:
            found = self._orders[key] = causal_mask(*key)
        return found


def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> torch.Tensor:
    """bool (R, R'): a query sees its own key and those before it, with `window` the window - 1 before it; ends are aligned."""
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)[None]
    return key <= query if window is None else (key <= query) & (key > query - window)
