"""Activation functions by the names that recipes use."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.autograd.function import once_differentiable

from megavlm_kernels import quick_gelu as formula
from megavlm_kernels.blocks import FEW_ELEMENTS, row_blocks
from megavlm_kernels.swiglu import gated_linear_unit


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's sigmoid approximation of GELU; on a CPU nothing but x is kept for the backward pass."""
    if torch.compiler.is_compiling() or x.is_cuda or x.numel() <= FEW_ELEMENTS:
        return formula.quick_gelu(x)
    out: torch.Tensor = _QuickGelu.apply(x)  # type: ignore[no-untyped-call]
    return out


class _QuickGelu(torch.autograd.Function):
    """In blocks of rows that stay in the cache."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        x_RF = x.reshape(-1, x.shape[-1])
        out_RF = torch.empty_like(x_RF, memory_format=torch.contiguous_format)
        for rows in row_blocks(*x_RF.shape):
            formula.quick_gelu(x_RF[rows], out=out_RF[rows])
        return out_RF.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        x_RF, grad_RF = (t.reshape(-1, x.shape[-1]) for t in (x, grad))
        out_RF = torch.empty_like(x_RF, memory_format=torch.contiguous_format)
        for rows in row_blocks(*x_RF.shape):
            formula.times_quick_gelu_slope(grad_RF[rows], x_RF[rows], out_RF[rows])
        return out_RF.view(x.shape)


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU, tanh approximation."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "silu": F.silu,
    "relu": F.relu,
}


class GatedActivation:
    """activation(gate) x up of a gated MLP, for megatron-core's `activation_func` submodule: (..., 2F), gate first -> (..., F)."""

    def __init__(self, config: TransformerConfig) -> None:
        self.name = next(name for name, function in ACTIVATIONS.items() if function is config.activation_func)

    def __call__(self, gate_up: torch.Tensor) -> torch.Tensor:
        return gated_linear_unit(gate_up, self.name)
