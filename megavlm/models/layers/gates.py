"""Gates: how much of what a layer computes is added to the residual."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.models.layers.norms import new, replicated


class TanhGate(torch.nn.Module):
    """tanh(gate) x, the gate being one learned number that starts at 0: what a layer adds begins as nothing (Flamingo)."""

    def __init__(self, config: TransformerConfig, hidden_size: int, **_: Any) -> None:
        super().__init__()
        self.gate = replicated(torch.nn.Parameter(torch.zeros(1, **new(config))), config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gate.tanh()
