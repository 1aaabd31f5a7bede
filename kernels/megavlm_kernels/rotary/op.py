"""Rotary positions (https://arxiv.org/abs/2104.09864, section 3.4.2); the backward pass is the transposed rotation and needs no activation.

Tables have a row for each row of x, so positions may restart, have several axes (M-RoPE) or two (patches): the tables say.

Shape legend: L rows, H heads, K head width, W rotated width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megavlm_kernels.backend import uses_triton
from megavlm_kernels.blocks import FEW_ELEMENTS, row_blocks
from megavlm_kernels.rotary.reference import rotary_reference


def rotary(x_LHK: torch.Tensor, cos_LW: torch.Tensor, sin_LW: torch.Tensor) -> torch.Tensor:
    """Rotate the leading W elements of each head of (L, H, K), pairs (i, i + W / 2), the half-split order of Llama; in x's format.

    Element i < W / 2 becomes x_i cos_i - x_(i + W / 2) sin_i, its partner x_(i + W / 2) cos_(i + W / 2) + x_i sin_(i + W / 2). Computed in
    the wider of the formats of x and the tables; tables get no gradient.

    Raises ValueError where the tables have not a row for each row of x, or an odd or too large width.
    """
    width = cos_LW.shape[-1]
    if cos_LW.shape != sin_LW.shape or cos_LW.shape[0] != x_LHK.shape[0] or width % 2 or width > x_LHK.shape[-1]:
        raise ValueError(f"tables {tuple(cos_LW.shape)} and {tuple(sin_LW.shape)} do not rotate heads {tuple(x_LHK.shape)}")
    by_triton = uses_triton(x_LHK) and width > 0
    if not by_triton and (x_LHK.is_cuda or x_LHK.numel() <= FEW_ELEMENTS):
        return rotary_reference(x_LHK, cos_LW, sin_LW)
    out: torch.Tensor = _Rotary.apply(x_LHK, cos_LW, sin_LW, by_triton)  # type: ignore[no-untyped-call]
    return out


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, by_triton: bool) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.by_triton = by_triton
        return _turned(x, cos, sin, by_triton, transposed=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, ctx.by_triton, transposed=True), None, None, None


def _turned(x_LHK: torch.Tensor, cos_LW: torch.Tensor, sin_LW: torch.Tensor, by_triton: bool, *, transposed: bool) -> torch.Tensor:
    """The rotation or its transpose, which is the rotation by the negative angle."""
    if by_triton:
        from megavlm_kernels.rotary.triton import turn

        return turn(x_LHK, cos_LW, sin_LW, transposed)
    width, half = cos_LW.shape[-1], cos_LW.shape[-1] // 2
    # What multiplies the partner of each element.
    low, high = sin_LW[:, :half], sin_LW[:, half:]
    partner_LW = torch.cat([high, -low] if transposed else [-low, high], dim=-1)
    out = torch.empty(x_LHK.shape, dtype=x_LHK.dtype, device=x_LHK.device)
    wide = torch.promote_types(x_LHK.dtype, cos_LW.dtype)
    for rows in row_blocks(x_LHK.shape[0], x_LHK.shape[1] * x_LHK.shape[2]):
        x, cos_R1W, partner_R1W = x_LHK[rows, :, :width].to(wide), cos_LW[rows, None], partner_LW[rows, None]
        partners = torch.cat([x[..., half:], x[..., :half]], dim=-1).mul_(partner_R1W)
        out[rows, :, :width] = partners.addcmul_(x, cos_R1W)
        if width < x_LHK.shape[-1]:
            out[rows, :, width:] = x_LHK[rows, :, width:]
    return out
