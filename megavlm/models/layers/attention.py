"""Block-diagonal attention over packed sequences, as the core attention of megatron-core's layers.

Rotary positions are applied here, from tables that `Packing` computed once per microbatch, and not by megatron-core's
SelfAttention: its packed path ignores position ids and loops over segments in every layer.

Backends: one scaled-dot-product call per segment (any device; equal segments become one batched call), and torch's
`varlen_attn` on CUDA in bf16. Segments that need more than causal order, and soft-capped scores, get a mask of their own
(`masks.py`). Transformer Engine's layers, where they are used, get this same core attention.

Shape legend: L local rows, S all rows, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from megavlm.models.layers.masks import Piece, is_plain
from megavlm.models.layers.packing import Packing, apply_rotary

SCORES_AT_A_TIME = 1 << 26
"""Soft-capped scores that exist at once: 256 MiB in fp32, for each of the steps between query and softmax."""
CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


@dataclass(frozen=True)
class AttentionStyle:
    """What tells one family's attention from another's; one object for all layers of a model."""

    scale: float | None = None
    """None: 1 / sqrt(head width)."""
    softcap: float | None = None
    window_tokens: int | None = None
    """Sliding window (itself included) of the layers `window_layers`."""
    window_layers: frozenset[int] = frozenset()
    """Numbers from 1, over all pipeline stages."""
    rotary_by_window: bool = False
    """Layers with a window use the rotary table "local" instead of "global"."""

    def window_of(self, layer_number: int) -> int | None:
        return self.window_tokens if layer_number in self.window_layers else None

    def rotary_of(self, layer_number: int) -> str:
        return "local" if self.rotary_by_window and layer_number in self.window_layers else "global"


class PackedAttention(MegatronModule):
    """Core attention for `packed_seq_params` of type `Packing`; nothing else reaches it in this project."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        style: AttentionStyle | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        style = style or AttentionStyle()
        self.window, self.softcap, self.rotary = style.window_of(layer_number), style.softcap, style.rotary_of(layer_number)
        self.is_causal = attn_mask_type in CAUSAL
        self.scale = style.scale or softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.context_group = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> torch.Tensor:
        """(L, H, K), (L, G, K), (L, G, K) -> (L, H x K)."""
        packing = packed_seq_params
        assert isinstance(packing, Packing), "every forward pass here is packed: build a Packing with megavlm.models.layers.packing.pack"
        if self.rotary in packing.rotary:
            cos_LK, sin_LK = packing.rotary[self.rotary]
            if packing.cache is not None and query.dtype == key.dtype:
                # One turn for both: with a row a sequence the number of operations is what costs.
                turned = apply_rotary(torch.cat([query, key], dim=1), cos_LK, sin_LK)
                query, key = turned.split([query.shape[1], key.shape[1]], dim=1)
            else:
                query, key = (apply_rotary(x, cos_LK, sin_LK) for x in (query, key))
        if packing.cache is not None:
            out = packing.cache.attend(self.layer_number, query, key, value, packing, self.scale, window=self.window, softcap=self.softcap)
            return out.reshape(query.shape[0], -1)
        if packing.gathered_order_S is not None:
            key, value = (self._gather_context(x, packing.gathered_order_S) for x in (key, value))
        out = attend_packed(query, key, value, packing, causal=self.is_causal, scale=self.scale, window=self.window, softcap=self.softcap)
        return out.reshape(query.shape[0], -1)

    def _gather_context(self, x: torch.Tensor, order_S: torch.Tensor) -> torch.Tensor:
        """Keys or values of the whole sequence; the backward pass reduce-scatters their gradients to the owners."""
        from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

        return gather_from_sequence_parallel_region(x.contiguous(), group=self.context_group)[order_S]


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention inside each segment: (L, H, K), (S, G, K), (S, G, K) -> (L, H, K).

    `window` (tokens that a row sees, itself included) and the groups of `packing.masks` are for causal attention.
    """
    grouped = any(piece.grouped for piece in packing.pieces)
    is_simple = packing.gathered_order_S is None and not packing.keys_overlap
    runs_varlen = query.is_cuda and is_simple and _varlen_attn is not None and query.dtype != torch.float32
    if runs_varlen and softcap is None and not grouped:
        sides = (-1 if window is None else window - 1, 0) if causal else (-1, -1)
        cu_q, longest_q, cu_k, longest_k = packing.cu_seqlens_q, packing.max_seqlen_q, packing.cu_seqlens_kv, packing.max_seqlen_kv
        # enable_gqa came after torch 2.11: repeat the key/value heads instead.
        key, value = _repeated(key, value, query.shape[1], dim=1)
        return _varlen_attn(query, key, value, cu_q, cu_k, longest_q, longest_k, scale=scale, window_size=sides)
    if packing.equal_length is not None and not grouped:
        segments = query.shape[0] // packing.equal_length  # a resampler's keys are more than its queries
        q, k, v = (x.unflatten(0, (segments, -1)).transpose(1, 2) for x in (query, key, value))
        return _attend(q, k, v, packing, packing.pieces[0], causal, scale, window, softcap).transpose(1, 2).flatten(0, 1)
    outputs = [
        _attend(q, k, v, packing, piece, causal, scale, window, softcap).transpose(1, 2)
        for piece, (q, k, v) in zip(packing.pieces, _segments(query, key, value, packing), strict=True)
    ]
    return torch.cat(outputs, dim=1).squeeze(0)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packing: Packing,
    piece: Piece,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One piece, or equal segments as a batch: (B, H, R, K), (B, G, R', K), (B, G, R', K) -> (B, H, R, K)."""
    plain, is_square = is_plain(piece, window), piece.query_length == piece.key_length
    mask: Any = None
    if causal and (softcap is not None or not plain):
        assert packing.masks is not None
        mask = packing.masks.mask(piece, window)
    if softcap is not None:
        return capped_attention(q, k, v, mask, scale, softcap)
    if causal and plain and not is_square:
        # Queries in the middle of a segment (context parallelism) are aligned to the end of their keys.
        mask = causal_lower_right(q.shape[2], k.shape[2])
    is_causal, grouped = causal and plain and is_square, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """Attention whose scores are softcap x tanh(score / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2); softmax in fp32.

    `mask` is True where a query sees a key and broadcasts to (B, H, R, K). torch's fused attention knows no soft cap: where the scores
    would take much memory they are computed for some queries at a time, and again in the backward pass.
    """
    k, v = _repeated(k, v, q.shape[1], dim=1)
    rows = max(1, SCORES_AT_A_TIME // (q.shape[0] * q.shape[1] * k.shape[2]))
    if rows >= q.shape[2]:
        return _capped(q, k, v, mask, scale, softcap)
    assert mask is None or mask.shape[-2] == q.shape[2]
    outputs = []
    for start in range(0, q.shape[2], rows):
        part = (q[:, :, start : start + rows], k, v, None if mask is None else mask[..., start : start + rows, :], scale, softcap)
        outputs.append(checkpoint(_capped, *part, use_reentrant=False) if torch.is_grad_enabled() else _capped(*part))
    return torch.cat(outputs, dim=2)


def _capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float) -> torch.Tensor:
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * (scale / softcap))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(v.dtype, torch.float32)).to(v.dtype) @ v


def _repeated(key: torch.Tensor, value: torch.Tensor, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value heads, each as often as query heads share it."""
    times = heads // key.shape[dim]
    return (key, value) if times == 1 else (key.repeat_interleave(times, dim), value.repeat_interleave(times, dim))


def _segments(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values of each piece as (1, heads, rows, K).

    Segments that lie side by side are split, not sliced: the gradient of a split is one concatenation, that of a slice is a
    zero-filled tensor of the whole pack, for each segment.
    """
    pieces = packing.pieces
    queries = query.split([p.query_length for p in pieces])
    if packing.gathered_order_S is None and not packing.keys_overlap:
        lengths = [p.key_length for p in pieces]
        pairs = zip(key.split(lengths), value.split(lengths), strict=True)
    else:
        rows = [slice(p.key_start, p.key_start + p.key_length) for p in pieces]
        pairs = zip([key[r] for r in rows], [value[r] for r in rows], strict=True)
    for q, (k, v) in zip(queries, pairs, strict=True):
        yield tuple(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))


def _find_varlen_attn() -> Any:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


_varlen_attn = _find_varlen_attn()
