"""Rows of a tensor replaced by others: visual features take their placeholders' rows among the token embeddings.

Positions stay on the device: no way here asks how many rows a mask selects, so the host never waits. The kernels write the result in one
sweep, and both gradients in another, where torch copies everything first and writes the rows then. With a frozen embedding, whose gradient
nobody wants, the backward pass only gathers.

Shape legend: S rows, N replaced rows, D width of a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megavlm_kernels.backend import uses_triton


def scatter_features(x: torch.Tensor, features: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """(S, ...) with the rows `positions_N` (int64, on x's device, each at most once) replaced by `features` (N, ...), in x's format.

    A position outside of x is an IndexError on a CPU and a device-side assertion on CUDA, as of torch's own indexing.

    Raises ValueError when the shapes do not fit.
    """
    if positions_N.shape != features.shape[:1] or features.shape[1:] != x.shape[1:]:
        shapes = ", ".join(f"{tuple(t.shape)}" for t in (x, features, positions_N))
        raise ValueError(f"rows {shapes}: features need one position each, and the width of the rows that they replace")
    if not uses_triton(x):
        # Rows are copied whole; `index_put` goes element by element, which takes up to 1.7 times as long on a CPU.
        return x.index_copy(0, positions_N, features.to(x.dtype))
    out: torch.Tensor = _ScatterFeatures.apply(x, features, positions_N)  # type: ignore[no-untyped-call]
    return out


class _ScatterFeatures(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, features: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
        from megavlm_kernels.scatter_features.triton import forward, source_rows

        source_S = source_rows(x.shape[0], positions_N)
        ctx.save_for_backward(source_S, positions_N)
        ctx.features = features.shape, features.dtype
        return forward(_rows(x), _rows(features), source_S).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        from megavlm_kernels.scatter_features.triton import backward

        source_S, positions_N = ctx.saved_tensors
        (wants_x, wants_features, _), (shape, dtype) = ctx.needs_input_grad, ctx.features
        if not wants_x:
            return None, grad.index_select(0, positions_N).to(dtype), None
        grad_x, grad_features = backward(_rows(grad), source_S, shape[0] if wants_features else 0, dtype)
        return grad_x.view(grad.shape), grad_features.view(shape) if wants_features else None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """(rows, elements of a row); -1 would be ambiguous without a row."""
    return x.reshape(x.shape[0], x.shape[1:].numel())
