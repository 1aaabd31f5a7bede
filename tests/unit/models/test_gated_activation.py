"""Gated MLPs take the kernels' unit, whichever activation megatron-core's own switch would know."""

from __future__ import annotations

import pytest
import torch

from megavlm.models.layers.activations import ACTIVATIONS, GatedActivation
from megavlm.models.layers.configs import LayerConfig


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_gated_and_plain(name: str) -> None:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "activation_func": ACTIVATIONS[name]}
    config = LayerConfig(**sizes, gated_linear_unit=True, add_bias_linear=False)
    assert config.use_te_activation_func
    assert not LayerConfig(**sizes).use_te_activation_func
    gate, up = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(GatedActivation(config)(torch.cat([gate, up], dim=-1)), ACTIVATIONS[name](gate) * up, rtol=1e-6, atol=1e-7)
