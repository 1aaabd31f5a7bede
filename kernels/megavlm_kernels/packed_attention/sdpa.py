"""torch's scaled_dot_product_attention, one call a segment; segments of one length are one batched call. Any device, any dtype.

On a CPU plain segments of unequal lengths go by joined.py: the same kernel and the same bits, with one result instead of two.

Per segment it costs the sum of squared lengths, as the kernels for packed sequences do; masks and padding cost more on a CPU by far
(benchmarks/attention.py).

Shape legend: L query rows, S key rows, H heads, G key/value heads, K head width; B segments of R queries and R' keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from megavlm_kernels.packed_attention.joined import can_join, joined_attention
from megavlm_kernels.packed_attention.segments import Segments

SCORES_AT_A_TIME = 1 << 26
"""Soft-capped scores that exist at once: 256 MiB in fp32, for each of the steps between query and softmax."""


def sdpa_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """(L, H, K), (S, G, K), (S, G, K) -> (L, H, K)."""
    if segments.is_uniform:
        batch = len(segments.query_lengths)
        q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (query, key, value))
        return _attend(q, k, v, segments, 0, causal, scale, window, softcap).transpose(1, 2).flatten(0, 1)
    plain = softcap is None and not segments.masked and (window is None or segments.longest_key <= window)
    if plain and can_join(query, key, value, segments):
        return joined_attention(query, key, value, segments, causal=causal, scale=scale)
    outputs = [
        _attend(q, k, v, segments, i, causal, scale, window, softcap).transpose(1, 2)
        for i, (q, k, v) in enumerate(_split(query, key, value, segments))
        if q.shape[2]
    ]
    return torch.cat(outputs, dim=1).squeeze(0) if outputs else query


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    number: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """One segment, or equal ones as a batch: (B, H, R, K), (B, G, R', K), (B, G, R', K) -> (B, H, R, K)."""
    rows, keys = q.shape[2], k.shape[2]
    plain = number not in segments.masked and (window is None or keys <= window)
    mask: Any = segments.mask(number, window, q.device) if causal and (softcap is not None or not plain) else None
    if softcap is not None:
        return capped_attention(q, k, v, mask, scale, softcap)
    if causal and plain and rows != keys:
        # Queries from the middle of a segment (context parallelism) are aligned to the end of their keys.
        mask = causal_lower_right(rows, keys)
    is_causal, grouped = causal and plain and rows == keys, q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)


def _split(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Queries, keys and values of each segment as (1, heads, rows, K).

    Segments that lie side by side are split, not sliced: the gradient of a split is one concatenation, that of a slice is a
    zero-filled tensor of the whole pack, for each segment.
    """
    queries = query.split(segments.query_lengths)
    if segments.key_starts is None:
        pairs = zip(key.split(segments.key_lengths), value.split(segments.key_lengths), strict=True)
    else:
        rows = [slice(start, start + n) for start, n in zip(segments.key_starts, segments.key_lengths, strict=True)]
        pairs = zip([key[r] for r in rows], [value[r] for r in rows], strict=True)
    for q, (k, v) in zip(queries, pairs, strict=True):
        yield tuple(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))


def capped_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float
) -> torch.Tensor:
    """Attention whose scores are softcap x tanh(score / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2); softmax in fp32.

    (B, H, R, K), (B, G, R', K), (B, G, R', K) -> (B, H, R, K). `mask` is True where a query sees a key and broadcasts to (B, H, R, R').
    torch's fused attention knows no soft cap: where the scores would take much memory they are computed for some queries at a time, and
    again in the backward pass.
    """
    k, v = repeated(k, v, q.shape[1], dim=1)
    rows = max(1, SCORES_AT_A_TIME // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
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


def repeated(key: torch.Tensor, value: torch.Tensor, heads: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value heads, each as often as query heads share it."""
    times = heads // key.shape[dim]
    return (key, value) if times == 1 else (key.repeat_interleave(times, dim), value.repeat_interleave(times, dim))
