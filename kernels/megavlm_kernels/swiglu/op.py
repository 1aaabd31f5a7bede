"""Gated linear units (https://arxiv.org/abs/2002.05202) on the output of one matrix product for gate and up.

Only that product is kept: the activated gate, as large as the unit's output, is computed again in the backward pass, which writes both
halves of the gradient at once. autograd of the formula keeps it, and sweeps over memory twice as often. Without Triton the same is done by
plain torch in blocks of rows that stay in the cache.

Shape legend: R rows, F width of the unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megavlm_kernels.backend import uses_triton
from megavlm_kernels.blocks import FEW_ELEMENTS, row_blocks
from megavlm_kernels.quick_gelu import times_quick_gelu_slope
from megavlm_kernels.swiglu.reference import ACTIVATIONS, gated_linear_unit_reference


def gated_linear_unit(gate_up: torch.Tensor, activation: str = "silu") -> torch.Tensor:
    """activation(gate) x up of (..., 2F), gate first, as megatron-core's first layer of an MLP gives them -> (..., F).

    `activation` is silu (SwiGLU), gelu or gelu_tanh (GeGLU), quick_gelu or relu (ReGLU). Kernels compute in fp32 whatever the format.

    Raises ValueError for another activation or an odd width.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: choose from {', '.join(ACTIVATIONS)}")
    if gate_up.shape[-1] % 2:
        raise ValueError(f"{gate_up.shape[-1]} columns are no gate and up of one width")
    by_triton = uses_triton(gate_up)
    if torch.compiler.is_compiling() or (not by_triton and (gate_up.is_cuda or gate_up.numel() <= FEW_ELEMENTS)):
        return gated_linear_unit_reference(gate_up, activation)
    out: torch.Tensor = _GatedLinearUnit.apply(gate_up, activation, by_triton)  # type: ignore[no-untyped-call]
    return out


class _GatedLinearUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: str, by_triton: bool) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation, ctx.by_triton = activation, by_triton
        width = gate_up.shape[-1] // 2
        return _forward(gate_up.reshape(-1, 2 * width), activation, by_triton).view(*gate_up.shape[:-1], width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        width = grad.shape[-1]
        gradient = _backward(grad.reshape(-1, width), gate_up.reshape(-1, 2 * width), ctx.activation, ctx.by_triton)
        return gradient.view(gate_up.shape), None, None


def _forward(gate_up_R2F: torch.Tensor, activation: str, by_triton: bool) -> torch.Tensor:
    """(R, F)."""
    if by_triton:
        from megavlm_kernels.swiglu.triton import forward

        return forward(gate_up_R2F, activation)
    num_rows, width = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    out_RF = torch.empty(num_rows, width, dtype=gate_up_R2F.dtype, device=gate_up_R2F.device)
    for rows in row_blocks(num_rows, 2 * width):
        gate, up = gate_up_R2F[rows].chunk(2, dim=1)
        torch.mul(ACTIVATIONS[activation](gate), up, out=out_RF[rows])
    return out_RF


def _backward(grad_RF: torch.Tensor, gate_up_R2F: torch.Tensor, activation: str, by_triton: bool) -> torch.Tensor:
    """Gradient of gate and up, (R, 2F)."""
    if by_triton:
        from megavlm_kernels.swiglu.triton import backward

        return backward(grad_RF, gate_up_R2F, activation)
    num_rows, width = grad_RF.shape
    out_R2F = torch.empty(num_rows, 2 * width, dtype=gate_up_R2F.dtype, device=gate_up_R2F.device)
    for rows in row_blocks(num_rows, 2 * width):
        (gate, up), grad = gate_up_R2F[rows].chunk(2, dim=1), grad_RF[rows]
        grad_gate, grad_up = out_R2F[rows].chunk(2, dim=1)
        torch.mul(grad, ACTIVATIONS[activation](gate), out=grad_up)
        _SLOPES[activation](grad * up, gate, grad_gate)
    return out_R2F


def _times_slope(backward: Any, *more: Any, **named: Any) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    def write(grad: torch.Tensor, gate: torch.Tensor, out: torch.Tensor) -> None:
        backward(grad, gate, *more, **named, grad_input=out)

    return write


_aten = torch.ops.aten
_SLOPES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]] = {
    "silu": _times_slope(_aten.silu_backward),
    "gelu": _times_slope(_aten.gelu_backward),
    "gelu_tanh": _times_slope(_aten.gelu_backward, approximate="tanh"),
    "quick_gelu": times_quick_gelu_slope,
    "relu": _times_slope(_aten.threshold_backward, 0),
}
"""(upstream gradient of the activated gate, gate, where the gate's gradient goes): torch's own backward formulas."""
