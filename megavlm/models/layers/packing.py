"""What attention must know of a packed microbatch: where segments lie, positions' rotations, and the context split.

Built once per microbatch on every pipeline stage (a stage without it would let samples of a pack attend to each other)
and carried through megatron-core's layers as their `packed_seq_params`.

Shape legend: S rows of the packed sequence (all of them), L rows of this context rank, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megavlm.models.layers.context import ContextPart
from megavlm.models.layers.masks import Groups, Masks, Piece
from megavlm.parallel.host import on_device
from megavlm.topology.context import ContextLayout
from megavlm_kernels.packed_attention import Segments
from megavlm_kernels.rotary import rotary


@dataclass
class Packing(PackedSeqParams):
    """megatron-core's packed-sequence parameters, with rotations and pieces computed once instead of once per layer."""

    pieces: tuple[Piece, ...] = ()
    """What is seen; several may see the same keys."""
    masks: Masks | None = None
    """Built when a layer asks for one; causal order needs none."""
    segments: Segments | None = None
    """The pieces as attention's kernels take them; put together by the first layer that asks."""
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Name of a table -> cos and sin, each (L, rotated width); a layer's attention picks one. Empty: positions are not rotated."""
    context: ContextPart | None = None
    """What context parallelism adds; None: this rank has the whole sequence."""
    cache: Any = None
    """Key/value cache of inference; None in training."""
    sides: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> rows (M, 1, D) beside the sequence that layers read: visual features (models/handover.py)."""
    sight: Any = None
    """Which of the features in `sides` each row sees (models/language/cross.py); None: no layer reads pictures."""
    balance: Any = None
    """What balances experts in training (models/layers/experts.py); None: nothing does."""


def apply_rotary(x_LHK: torch.Tensor, cos_LK: torch.Tensor, sin_LK: torch.Tensor) -> torch.Tensor:
    """Rotate the leading cos.shape[-1] elements of each head of (L, heads, K), in the half-split order of Llama.

    Tables in fp32 turn bf16 in fp32; what comes back has the format of x.
    """
    return rotary(x_LHK, cos_LK, sin_LK)


def pack(
    segment_lengths: Sequence[int],
    device: torch.device,
    *,
    causal: bool,
    context: tuple[ContextLayout, int] | None = None,
    rotary: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    groups: Groups | None = None,
) -> Packing:
    """Describe a packed sequence of `segment_lengths`.

    `context` is the split over context ranks and this rank's number in it; `rotary` holds cos and sin (S, width) of the
    whole sequence by name. Without `causal` every row of a segment sees the whole segment. Rows of `groups` see each other both ways.
    """
    bounds = [0, *accumulate(segment_lengths)]
    longest = max(segment_lengths, default=0)
    packing = Packing(qkv_format="thd", max_seqlen_q=longest, max_seqlen_kv=longest)
    packing.masks = Masks(device, groups)
    grouped = groups.segments if groups else frozenset()
    if context is None:
        packing.cu_seqlens_q = packing.cu_seqlens_kv = _cumulated(segment_lengths, device)
        packing.pieces = tuple(
            Piece(start, length, start, length, start, number in grouped)
            for number, (start, length) in enumerate(zip(bounds, segment_lengths, strict=False))
            if length
        )
        packing.rotary.update(rotary or {})
        return packing
    layout, rank = context
    packing.context = ContextPart.of(layout, rank, device, whole=grouped if causal else None)
    packing.pieces = _pieces(layout, rank, grouped, whole=grouped if causal else None)
    packing.cu_seqlens_q = _cumulated([piece.query_length for piece in packing.pieces], device)
    packing.cu_seqlens_kv = _cumulated([piece.key_length for piece in packing.pieces], device)
    packing.max_seqlen_q = max((piece.query_length for piece in packing.pieces), default=0)
    packing.max_seqlen_kv = max((piece.key_length for piece in packing.pieces), default=0)
    rows = packing.context.rows_L
    packing.rotary.update({name: (cos[rows], sin[rows]) for name, (cos, sin) in (rotary or {}).items()})
    return packing


def _cumulated(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    return on_device([0, *accumulate(lengths)], device, torch.int32)


def _pieces(layout: ContextLayout, rank: int, grouped: frozenset[int], whole: frozenset[int] | None) -> tuple[Piece, ...]:
    """One piece a span: queries without pads, and behind one another the keys that `KeyExchange` brings for each."""
    pieces, query_start, key_start = [], 0, 0
    for span, (key_row, num_keys) in zip(layout.spans[rank], layout.keys(rank, whole), strict=True):
        pieces.append(Piece(query_start, span.length, key_start, num_keys, span.row, span.segment in grouped, key_row))
        query_start, key_start = query_start + span.length, key_start + num_keys
    return tuple(pieces)
