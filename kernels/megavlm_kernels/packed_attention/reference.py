"""What `packed_attention` computes: one masked softmax over everything; in fp64 the truth that tests compare with.

Shape legend: L query rows, S key rows, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from megavlm_kernels.packed_attention.segments import Segments


def packed_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """(L, H, K), (S, G, K), (S, G, K) -> (L, H, K), in the inputs' dtype. A query without a key gives zeros."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = torch.einsum("qhk,shk->hqs", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = visible_rows(segments, query.shape[0], key.shape[0], query.device, causal=causal, window=window)
    seen = visible.any(-1, keepdim=True)
    weights = scores.masked_fill(~visible & seen, float("-inf")).softmax(-1) * seen
    return torch.einsum("hqs,shk->qhk", weights, value)


def visible_rows(
    segments: Segments, queries: int, keys: int, device: torch.device, *, causal: bool, window: int | None = None
) -> torch.Tensor:
    """bool (L, S): which query sees which key."""
    visible = torch.zeros(queries, keys, dtype=torch.bool, device=device)
    starts = segments.key_starts or tuple(accumulate(segments.key_lengths, initial=0))
    first = 0
    for i, (rows, seen) in enumerate(zip(segments.query_lengths, segments.key_lengths, strict=True)):
        block = segments.mask(i, window, device) if causal else True
        visible[first : first + rows, starts[i] : starts[i] + seen] = block
        first += rows
    return visible
