"""What `gated_linear_unit` computes, in two lines of torch; in fp64 it is the truth that tests compare with."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from megavlm_kernels.quick_gelu import quick_gelu


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
}


def gated_linear_unit_reference(gate_up: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(first half) x second half of the last dim: (..., 2F) -> (..., F)."""
    gate, up = torch.chunk(gate_up, 2, dim=-1)
    return ACTIVATIONS[activation](gate) * up
