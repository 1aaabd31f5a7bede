"""What attention must know of a packed microbatch: where segments lie, positions' rotations, and the context split.

Built once per microbatch on every pipeline stage (a stage without it would let samples of a pack attend to each other)
and carried through megatron-core's layers as their `packed_seq_params`.

Shape legend: S rows of the packed sequence (all of them), L rows of this context rank, K head dim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megavlm.models.layers.masks import Groups, Masks, Piece


@dataclass
class Packing(PackedSeqParams):
    """megatron-core's packed-sequence parameters, with rotations and pieces computed once instead of once per layer."""

    pieces: tuple[Piece, ...] = ()
    masks: Masks | None = None
    """Built when a layer asks for one; causal order needs none."""
    keys_overlap: bool = False
    """Several pieces see the same keys: pieces alone say what is seen, not the bounds of segments."""
    equal_length: int | None = None
    """Length of every segment when all are equal (tiles): attention then runs as one batch."""
    rotary: dict[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """Name of a table -> cos and sin, each (L, rotated width); a layer's attention picks one. Empty: positions are not rotated."""
    gathered_order_S: torch.Tensor | None = None
    """With context parallelism: row of the rank-major gathered keys that holds each row of the sequence."""
    cache: Any = None
    """Key/value cache of inference; None in training."""
    sides: dict[str, torch.Tensor] = field(default_factory=dict)
    """Name -> rows (M, 1, D) beside the sequence that layers read: visual features (models/handover.py)."""
    sight: Any = None
    """Which of the features in `sides` each row sees (models/language/cross.py); None: no layer reads pictures."""
    balance: Any = None
    """What balances experts in training (models/layers/experts.py); None: nothing does."""
    rows_L: torch.Tensor | None = field(default=None)
    """With context parallelism: rows of the sequence that this rank owns; None: all."""


def context_rows(num_rows: int, rank: int, size: int) -> torch.Tensor:
    """Rows of rank `rank`: chunk `rank` and its mirror image of 2 x size equal chunks (zigzag: equal causal work).

    Raises ValueError when the sequence does not split into 2 x size chunks.
    """
    if num_rows % (2 * size):
        raise ValueError(f"{num_rows} tokens do not split into 2 x parallel.context={2 * size} equal chunks: change data.seq_len_tokens")
    chunk = num_rows // (2 * size)
    mirror = 2 * size - 1 - rank
    return torch.cat([torch.arange(rank * chunk, (rank + 1) * chunk), torch.arange(mirror * chunk, (mirror + 1) * chunk)])


def apply_rotary(x_LHK: torch.Tensor, cos_LK: torch.Tensor, sin_LK: torch.Tensor) -> torch.Tensor:
    """Rotate the leading cos.shape[-1] elements of each head of (L, heads, K), in the half-split order of Llama.

    Tables in fp32 turn bf16 in fp32; what comes back has the format of x.
    """
    width = cos_LK.shape[-1]
    turned, rest = x_LHK[..., :width], x_LHK[..., width:]
    first, second = turned.chunk(2, dim=-1)
    out = turned * cos_LK[:, None, :] + torch.cat([-second, first], dim=-1) * sin_LK[:, None, :]
    out = out.to(x_LHK.dtype)
    return out if rest.shape[-1] == 0 else torch.cat([out, rest], dim=-1)


def pack(
    segment_lengths: Sequence[int],
    device: torch.device,
    *,
    causal: bool,
    context: tuple[int, int] = (0, 1),
    rotary: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
    groups: Groups | None = None,
) -> Packing:
    """Describe a packed sequence of `segment_lengths`.

    `context` is (rank, size) of context parallelism; `rotary` holds cos and sin (S, width) of the whole sequence by name.
    Without `causal` every row of a segment sees the whole segment. Rows of `groups` see each other both ways.
    """
    rank, size = context
    bounds = [0, *accumulate(segment_lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=device)
    longest = max(segment_lengths, default=0)
    packing = Packing(qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=longest, max_seqlen_kv=longest)
    rows = None
    if size > 1:
        rows = context_rows(bounds[-1], rank, size)
        packing.rows_L = rows.to(device)
        packing.gathered_order_S = torch.argsort(torch.cat([context_rows(bounds[-1], r, size) for r in range(size)])).to(device)
    elif segment_lengths and min(segment_lengths) == longest:
        packing.equal_length = longest
    packing.pieces = _pieces(bounds, owned_chunks(bounds[-1], rank, size), causal, groups.segments if groups else frozenset())
    packing.masks = Masks(device, groups)
    for name, tables in (rotary or {}).items():
        packing.rotary[name] = tables if packing.rows_L is None else (tables[0][packing.rows_L], tables[1][packing.rows_L])
    return packing


def owned_chunks(num_rows: int, rank: int, size: int) -> list[tuple[int, int]]:
    """Rows (first, one past the last) of the sequence that a context rank owns."""
    if size == 1:
        return [(0, num_rows)]
    chunk, mirror = num_rows // (2 * size), 2 * size - 1 - rank
    return [(rank * chunk, (rank + 1) * chunk), (mirror * chunk, (mirror + 1) * chunk)]


def _pieces(
    bounds: Sequence[int], chunks: Sequence[tuple[int, int]], causal: bool, grouped: frozenset[int] = frozenset()
) -> tuple[Piece, ...]:
    """Cut every owned chunk at segment bounds; queries then see their segment's keys, up to their own end when causal.

    In segments with groups a query may see what comes after it: its keys are the whole segment's.
    """
    pieces, local = [], 0
    for chunk_start, chunk_end in chunks:
        for number, (start, end) in enumerate(pairwise(bounds)):
            low, high = max(start, chunk_start), min(end, chunk_end)
            if low < high:
                last = high if causal and number not in grouped else end
                pieces.append(Piece(local + low - chunk_start, high - low, start, last - start, low, number in grouped))
        local += chunk_end - chunk_start
    return tuple(pieces)
