"""Segments of one pack on a CPU by torch's own fused kernel, their results written into one tensor.

What autograd does with a call a segment and a concatenation keeps every result twice: by segment, for the backward pass of attention, and
joined, for what follows. Here the backward pass reads the joined one.

Shape legend: L rows of all segments, H heads, G key/value heads, K head width; R rows of a segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megavlm_kernels.packed_attention.segments import Segments

# What F.scaled_dot_product_attention calls on a CPU; its result does not say what the backward pass needs.
_FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def can_join(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments) -> bool:
    """Whether `joined_attention` may be called; masks, windows and soft caps are for its caller to see.

    Not where torch is asked for another kernel (`sdpa_kernel`), as to count products, nor where autocast chooses formats.
    """
    if not torch.backends.cuda.flash_sdp_enabled() or torch.is_autocast_enabled("cpu"):
        return False
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == key.shape[-1] == value.shape[-1]
    rows = all(x.stride(-1) == 1 for x in (query, key, value))
    return query.device.type == "cpu" and alike and rows and segments.is_square and segments.key_starts is None


def joined_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, *, causal: bool, scale: float
) -> torch.Tensor:
    """(L, H, K), (L, G, K), (L, G, K) -> (L, H, K), bit for bit what a call a segment gives."""
    joined: torch.Tensor = _Joined.apply(query, key, value, segments.query_starts, causal, scale)  # type: ignore[no-untyped-call]
    return joined


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: tuple[int, ...], causal: bool, scale: float
    ) -> torch.Tensor:
        joined = query.new_empty(query.shape)
        sums = []
        for target, q, k, v in _by_segment(starts, joined, query, key, value):
            result, log_sum = _FORWARD(q, k, v, 0.0, causal, scale=scale)
            target.copy_(result)
            sums.append(log_sum)
        ctx.save_for_backward(query, key, value, joined, *sums)
        ctx.starts, ctx.causal, ctx.scale = starts, causal, scale
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, joined, *sums = ctx.saved_tensors
        grads = [x.new_empty(x.shape) for x in (query, key, value)]
        segments = _by_segment(ctx.starts, *grads, upstream, query, key, value, joined)
        for (*targets, u, q, k, v, result), log_sum in zip(segments, sums, strict=True):
            found = _BACKWARD(u, q, k, v, result, log_sum, 0.0, ctx.causal, scale=ctx.scale)
            for target, grad in zip(targets, found, strict=True):
                target.copy_(grad)
        return *grads, None, None, None


def _by_segment(starts: tuple[int, ...], *packs: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Each segment's rows of each, (L, heads, K) -> (1, heads, R, K); views. Segments without a row are left out."""
    for start, end in pairwise(starts):
        if start < end:
            yield [x[start:end].transpose(0, 1).unsqueeze(0) for x in packs]
