"""Gated MLPs take the kernels' unit, whichever activation megatron-core's own switch would know; CLIP's activation by blocks."""

from __future__ import annotations

import pytest
import torch

from megavlm.models.layers.activations import ACTIVATIONS, FEW_ELEMENTS, GatedActivation, quick_gelu
from megavlm.models.layers.configs import LayerConfig
from megavlm_kernels.testing.tolerance import errors_against_truth, forward_and_gradients


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_gated_and_plain(name: str) -> None:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 1, "activation_func": ACTIVATIONS[name]}
    config = LayerConfig(**sizes, gated_linear_unit=True, add_bias_linear=False)
    assert config.use_te_activation_func
    assert not LayerConfig(**sizes).use_te_activation_func
    gate, up = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(GatedActivation(config)(torch.cat([gate, up], dim=-1)), ACTIVATIONS[name](gate) * up, rtol=1e-6, atol=1e-7)


def formula(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(300, 1, 257), (1, 1, 300_000)])
def test_quick_gelu_keeps_its_input_only(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    x, upstream = ((3 * torch.randn(shape, generator=generator)).to(dtype) for _ in range(2))
    x.requires_grad_()
    assert x.numel() > FEW_ELEMENTS
    kept: set[int] = set()

    def note(t: torch.Tensor) -> torch.Tensor:
        kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        quick_gelu(x)
    assert kept == {x.untyped_storage().data_ptr()}
    # And as a layer may give it: every other column of something wider.
    apart = torch.cat([x, x], dim=-1).detach()[..., ::2].requires_grad_()
    for given in (x, apart):
        truth = forward_and_gradients(formula, [given.detach().double().requires_grad_()], upstream.double())
        got, eager = (forward_and_gradients(function, [given], upstream) for function in (quick_gelu, formula))
        assert errors_against_truth(got, eager, truth, ["out", "gradient"]) == []
