"""Norms and channel scales that megatron-core's sequence parallelism accepts."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm_kernels.rms_norm import rms_norm


def replicated(parameter: torch.nn.Parameter, config: TransformerConfig) -> torch.nn.Parameter:
    """Mark a parameter that every tensor rank holds whole.

    Under sequence parallelism each tensor rank sees part of the rows: megatron-core sums gradients marked so.
    """
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


def new(config: TransformerConfig) -> dict[str, Any]:
    """Number format and device of new parameters: where megatron-core puts those of its own layers."""
    return {"dtype": config.params_dtype, "device": "cpu" if config.use_cpu_initialization else "cuda"}


class RMSNorm(torch.nn.Module):
    """Root-mean-square norm (https://arxiv.org/abs/1910.07467); with `config.layernorm_zero_centered_gamma` times 1 + weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps, self.zero_centered = eps, config.layernorm_zero_centered_gamma
        start = torch.zeros if self.zero_centered else torch.ones
        self.weight = replicated(torch.nn.Parameter(start(hidden_size, **new(config))), config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # In fp32, as Gemma's own code: 1 + a small weight would be rounded away in bf16.
        return rms_norm(x, self.weight, self.eps, zero_centered=self.zero_centered)


class LayerNorm(torch.nn.Module):
    """Layer norm (https://arxiv.org/abs/1607.06450)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = replicated(torch.nn.Parameter(torch.ones(hidden_size, **new(config))), config)
        self.bias = replicated(torch.nn.Parameter(torch.zeros(hidden_size, **new(config))), config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class LayerScale(torch.nn.Module):
    """A learned factor for each channel (https://arxiv.org/abs/2103.17239)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_: Any) -> None:
        super().__init__()
        self.weight = replicated(torch.nn.Parameter(torch.ones(hidden_size, **new(config))), config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


NORMS: dict[str, type[torch.nn.Module]] = {"rms_norm": RMSNorm, "layer_norm": LayerNorm}
