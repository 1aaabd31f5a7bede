"""Activation functions by the names that recipes use."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm_kernels.swiglu import gated_linear_unit


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """CLIP's sigmoid approximation of GELU."""
    return x * torch.sigmoid(1.702 * x)


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
