"""Gated linear units (https://arxiv.org/abs/2002.05202) on the output of one matrix product for gate and up.

The kernels keep only that product: the activated gate, as large as the unit's output, is computed again in the backward pass, which writes
both halves of the gradient at once. Plain torch keeps it: on a CPU computing it again costs as much as it saves.

Shape legend: R rows, F width of the unit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from megavlm_kernels.backend import uses_triton
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
    if not uses_triton(gate_up):
        return gated_linear_unit_reference(gate_up, activation)
    out: torch.Tensor = _GatedLinearUnit.apply(gate_up, activation)  # type: ignore[no-untyped-call]
    return out


class _GatedLinearUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: str) -> torch.Tensor:
        from megavlm_kernels.swiglu.triton import forward

        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        width = gate_up.shape[-1] // 2
        return forward(gate_up.reshape(-1, 2 * width), activation).view(*gate_up.shape[:-1], width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        from megavlm_kernels.swiglu.triton import backward

        (gate_up,) = ctx.saved_tensors
        width = grad.shape[-1]
        return backward(grad.reshape(-1, width), gate_up.reshape(-1, 2 * width), ctx.activation).view(gate_up.shape), None
