"""Which rows of a segment see which: causal order, sliding windows, and groups of rows that see each other both ways.

A mask is built when a layer first asks for it and shared by all layers with the same window.

Shape legend: S rows of the packed sequence, Q target tokens, N visual tokens, R queries of a piece, K its keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import torch

from megavlm.parallel.host import numbers_of_rows, on_device
from megavlm_kernels.transfer import to_device

Bidirectional = Literal["none", "prefix", "pictures"]


@dataclass(frozen=True)
class Piece:
    """Queries of one segment that this rank owns, and the keys they may see."""

    query_start: int
    """Among the queries of this rank."""
    query_length: int
    key_start: int
    """Among the keys that attention is given: those of the whole sequence, or what context parallelism brought."""
    key_length: int
    query_row: int
    """Row of the whole sequence that is the first query."""
    grouped: bool = False
    """Some of these rows see each other both ways."""
    key_row: int | None = None
    """Row of the whole sequence that is the first key; None: `key_start`."""


@dataclass
class Groups:
    """Rows that see each other whatever their order."""

    group_S: torch.Tensor
    """int64; rows of one segment with the same number see each other, -1 is no group."""
    within_window: bool
    """A sliding window hides what lies before it from a row of a group too."""
    segments: frozenset[int]
    """Numbers of the segments that have a group."""


def groups_of(
    kind: Bidirectional,
    segment_lengths: Sequence[int],
    is_sample: Sequence[bool],
    target_positions_Q: torch.Tensor,
    target_segments_Q: torch.Tensor,
    image_rows_N: torch.Tensor,
) -> Groups | None:
    """The groups of a microbatch; None when it has none.

    prefix (PaliGemma, https://arxiv.org/abs/2407.07726, section 3.2): a sample's rows up to the one that predicts its first target,
    all rows of a sample without targets; a sliding window does not cut a prefix (transformers 5.23, models/paligemma).
    pictures (Gemma 3): each run of placeholders; what lies before a sliding window stays hidden, what comes after a row
    in its picture does not (transformers 5.23, models/gemma3). Pictures side by side are one run there, and here.
    """
    if kind == "none" or max(segment_lengths, default=0) <= 1:
        return None
    device, num_rows = target_positions_Q.device, sum(segment_lengths)
    if kind == "prefix":
        segment_S = numbers_of_rows(segment_lengths, device)
        row_S = torch.arange(num_rows, device=device)
        ends = on_device([*accumulate(segment_lengths)], device)
        first_target = ends.scatter_reduce(0, target_segments_Q, target_positions_Q, "amin")
        first_target = torch.where(on_device(is_sample, device, torch.bool), first_target, -1)
        group_S = torch.where(row_S <= first_target[segment_S], segment_S, -1)
        return Groups(group_S, within_window=False, segments=frozenset(i for i, sample in enumerate(is_sample) if sample))
    # On the rows' own device, which is the host: which segments have pictures must be known there.
    is_visual = torch.zeros(num_rows, dtype=torch.bool, device=image_rows_N.device)
    is_visual[image_rows_N] = True
    starts = is_visual & ~torch.cat([is_visual.new_zeros(1), is_visual[:-1]])
    segments = frozenset(numbers_of_rows(segment_lengths, image_rows_N.device)[image_rows_N].unique().tolist())
    group_S = torch.where(is_visual, starts.cumsum(0), -1)
    return Groups(to_device(group_S, device), within_window=True, segments=segments) if segments else None


@dataclass
class Masks:
    """The masks of a packed sequence."""

    device: torch.device
    groups: Groups | None = None
    _built: dict[tuple[Piece, int | None], torch.Tensor] = field(default_factory=dict)

    def mask(self, piece: Piece, window: int | None) -> torch.Tensor:
        """bool (R, K): True where the query sees the key. `window`: a row sees itself and the window - 1 rows before it."""
        if window is not None and piece.key_length <= window:
            window = None
        found = self._built.get((piece, window))
        if found is None:
            found = self._built[piece, window] = self._build(piece, window)
        return found

    def _build(self, piece: Piece, window: int | None) -> torch.Tensor:
        query = torch.arange(piece.query_row, piece.query_row + piece.query_length, device=self.device)[:, None]
        first_key = piece.key_start if piece.key_row is None else piece.key_row
        key = torch.arange(first_key, first_key + piece.key_length, device=self.device)[None]
        visible = key <= query
        inside = None if window is None else key > query - window
        if self.groups is None or not piece.grouped:
            return visible if inside is None else visible & inside
        query_group, key_group = self.groups.group_S[query], self.groups.group_S[key]
        together = (query_group == key_group) & (query_group >= 0)
        if inside is None:
            return visible | together
        return (visible | together) & inside if self.groups.within_window else (visible & inside) | together
