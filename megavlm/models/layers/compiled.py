"""Encoder layers whose MLP half is one compiled graph (precision.compile_encoder).

The half is norm, first product, bias, activation, second product, bias, residual: all but the products is fused into a few kernels, forward
and backward. Attention stays outside: what it does depends on the segments of each microbatch, which would be compiled anew for each.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_block import TransformerBlock

from megavlm.planner.compiled import machine_stops
from megavlm.planner.precision import PrecisionError

RECOMPILATIONS = 64
"""One graph serves all layers of one shape and any number of rows; encoders side by side, evaluation and frozen layers have their own."""


def compile_mlps(block: TransformerBlock, device: torch.device) -> None:
    """Compile the MLP half of every layer of `block`, at its first forward pass. The layers are megatron-core's own, whole on each rank.

    Raises:
        PrecisionError: nothing is here to compile with.
    """
    reason = machine_stops(device.type)
    if reason is not None:
        raise PrecisionError(f"precision.compile_encoder=true cannot be done here: {reason}. Set it to false, or install that")
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, RECOMPILATIONS)
    for layer in block.layers:
        for linear in (layer.mlp.linear_fc1, layer.mlp.linear_fc2):
            linear._forward_impl = _product
        layer._forward_mlp = torch.compile(layer._forward_mlp, dynamic=True, fullgraph=True)


def _product(input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *_: Any, **__: Any) -> torch.Tensor:
    """What megatron-core's linear layers compute on one tensor rank; its own function (0.16.1, tensor_parallel/layers.py) calls
    warnings.warn where no group is given, which ends a graph."""
    return F.linear(input, weight, bias)
