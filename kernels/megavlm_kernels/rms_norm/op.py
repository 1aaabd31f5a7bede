"""Root-mean-square norm (https://arxiv.org/abs/1910.07467) whose backward pass is one sweep over its input.

With r = 1 / sqrt(mean(x^2) + eps), h = r x and u = (upstream gradient) x weight, the gradient of x is r (u - h mean(h u)) and that of the
weight the sum of upstream x h over rows. autograd of the formula takes ten sweeps for that, torch's own `F.rms_norm` on a CPU as many.
Of the forward pass only x itself and r are kept.

Shape legend: R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from megavlm_kernels.backend import uses_triton
from megavlm_kernels.blocks import BLOCK_ELEMENTS, FEW_ELEMENTS, accumulation_dtype, row_blocks, rows_per_block
from megavlm_kernels.rms_norm.limits import MAX_TRITON_WIDTH


def rms_norm(x: torch.Tensor, weight_D: torch.Tensor, eps: float, *, zero_centered: bool = False) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) x weight over the last dim of (..., D), in x's format.

    `zero_centered` multiplies by 1 + weight (Gemma). Computed in fp32 (fp64 for fp64) whatever the formats of x and weight are; the
    gradient of the weight adds up rows in fp32 too. Rows do not depend on each other, but how many there are decides which of two ways is
    quicker, and the two round differently.
    """
    by_triton = uses_triton(x) and x.shape[-1] <= MAX_TRITON_WIDTH
    if torch.compiler.is_compiling() or (not by_triton and (x.is_cuda or x.numel() <= FEW_ELEMENTS)):
        wide = accumulation_dtype(x.dtype) if zero_centered else torch.promote_types(x.dtype, weight_D.dtype)
        factor_D = weight_D.to(wide) + 1.0 if zero_centered else weight_D.to(wide)
        return F.rms_norm(x.to(factor_D.dtype), (x.shape[-1],), factor_D, eps).to(x.dtype)
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        out: torch.Tensor = _RMSNorm.apply(x, weight_D, eps, zero_centered, by_triton)  # type: ignore[no-untyped-call]
        return out
    rows_RD = x.reshape(-1, x.shape[-1])
    return _forward(rows_RD, weight_D, eps, zero_centered, by_triton)[0].view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_D: torch.Tensor, eps: float, zero_centered: bool, by_triton: bool) -> torch.Tensor:
        rows_RD = x.reshape(-1, x.shape[-1])
        out_RD, scale_R1 = _forward(rows_RD, weight_D, eps, zero_centered, by_triton)
        ctx.save_for_backward(rows_RD, weight_D, scale_R1)
        ctx.zero_centered, ctx.by_triton, ctx.shape = zero_centered, by_triton, x.shape
        return out_RD.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None]:
        x_RD, weight_D, scale_R1 = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        grad_RD = grad.reshape(x_RD.shape)
        if ctx.by_triton:
            from megavlm_kernels.rms_norm.triton import backward

            grad_x, grad_weight = backward(grad_RD, x_RD, weight_D, scale_R1, ctx.zero_centered, wants_x, wants_weight)
        else:
            grad_x, grad_weight = _backward(grad_RD, x_RD, weight_D, scale_R1, ctx.zero_centered, wants_x, wants_weight)
        return None if grad_x is None else grad_x.view(ctx.shape), grad_weight, None, None, None


def _forward(
    x_RD: torch.Tensor, weight_D: torch.Tensor, eps: float, zero_centered: bool, by_triton: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed rows, r of each row: (R, 1))."""
    if by_triton:
        from megavlm_kernels.rms_norm.triton import forward

        return forward(x_RD, weight_D, eps, zero_centered)
    (num_rows, width), wide = x_RD.shape, accumulation_dtype(x_RD.dtype)
    factor_D = _factor(weight_D, zero_centered, wide)
    if num_rows * width <= BLOCK_ELEMENTS:
        x = x_RD.to(wide)
        scale_R1 = _scale(x, eps)
        return (x * scale_R1).mul_(factor_D).to(x_RD.dtype), scale_R1
    out_RD = torch.empty_like(x_RD, memory_format=torch.contiguous_format)
    scale_R1 = torch.empty(num_rows, 1, dtype=wide, device=x_RD.device)
    room = None if x_RD.dtype == wide else x_RD.new_empty(rows_per_block(num_rows, width), width, dtype=wide)
    for rows in row_blocks(num_rows, width):
        x = x_RD[rows] if room is None else room[: rows.stop - rows.start].copy_(x_RD[rows])
        scale_R1[rows] = _scale(x, eps)
        out = torch.mul(x, scale_R1[rows], out=out_RD[rows] if room is None else x).mul_(factor_D)
        if room is not None:
            out_RD[rows] = out
    return out_RD, scale_R1


def _scale(x_RD: torch.Tensor, eps: float) -> torch.Tensor:
    """r, (R, 1). From torch's vector norm, which reads x once and writes nothing of its size."""
    norm_R1 = torch.linalg.vector_norm(x_RD, dim=-1, keepdim=True)
    return torch.addcmul(norm_R1.new_full((1,), eps), norm_R1, norm_R1, value=1.0 / x_RD.shape[-1]).rsqrt_()


def _factor(weight_D: torch.Tensor, zero_centered: bool, wide: torch.dtype) -> torch.Tensor:
    return weight_D.to(wide) + 1.0 if zero_centered else weight_D.to(wide)


def _backward(
    grad_RD: torch.Tensor,
    x_RD: torch.Tensor,
    weight_D: torch.Tensor,
    scale_R1: torch.Tensor,
    zero_centered: bool,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    (num_rows, width), wide = x_RD.shape, scale_R1.dtype
    factor_D = _factor(weight_D, zero_centered, wide)
    if num_rows * width <= BLOCK_ELEMENTS:
        grad, h = grad_RD.to(wide), x_RD * scale_R1
        gh = grad * h
        grad_weight = gh.sum(0).to(weight_D.dtype) if wants_weight else None
        if not wants_x:
            return None, grad_weight
        mean_R1 = (gh @ (factor_D / width)).unsqueeze(1)
        return (grad * factor_D).addcmul_(h, mean_R1, value=-1.0).mul_(scale_R1).to(x_RD.dtype), grad_weight
    grad_x = torch.empty_like(x_RD, memory_format=torch.contiguous_format) if wants_x else None
    grad_weight = torch.zeros(width, dtype=wide, device=x_RD.device) if wants_weight else None
    most = rows_per_block(num_rows, width)
    normed, product = (torch.empty(most, width, dtype=wide, device=x_RD.device) for _ in range(2))
    mean_D = factor_D / width
    for rows in row_blocks(num_rows, width):
        count, scale, grad = rows.stop - rows.start, scale_R1[rows], grad_RD[rows]
        if grad.dtype != wide:
            grad = grad.to(wide)
        h = torch.mul(x_RD[rows], scale, out=normed[:count]) if x_RD.dtype == wide else normed[:count].copy_(x_RD[rows]).mul_(scale)
        gh = torch.mul(grad, h, out=product[:count])
        if grad_weight is not None:
            grad_weight += gh.sum(0)
        if grad_x is not None:
            mean_R1 = torch.mv(gh, mean_D).unsqueeze(1)
            u = torch.mul(grad, factor_D, out=gh).addcmul_(h, mean_R1, value=-1.0)
            if grad_x.dtype == wide:
                torch.mul(u, scale, out=grad_x[rows])
            else:
                grad_x[rows] = u.mul_(scale)
    return grad_x, None if grad_weight is None else grad_weight.to(weight_D.dtype)
