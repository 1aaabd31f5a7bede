"""Run transformer layers one after another: what megatron-core's TransformerBlock.forward does, with hidden states from the middle.

Shape legend: L rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.utils.checkpoint import checkpoint

from megavlm.models.layers.packing import Packing

AfterLayer = Callable[[int, torch.Tensor], torch.Tensor]
"""(number of the layer, from 1 over all pipeline stages; its output) -> what goes on to the next layer."""


def run_layers(
    block: TransformerBlock,
    x_LBD: torch.Tensor,
    packing: Packing | Callable[[int], Packing],
    *,
    num_layers: int | None = None,
    taps: Sequence[int] = (),
    after: AfterLayer | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """(output of the last layer, hidden states after `taps` layers), without the block's final norm.

    `packing` may be a function of the layer's number (from 1). `num_layers`: only the first ones run. A tap of 0 is the input.
    With full recomputation a layer's activations are computed again in the backward pass; torch's non-reentrant checkpoint keeps the
    gradients of whatever the layer reads, tensors held by `packing` too.
    """
    layers: Sequence[Any] = list(block.layers)[:num_layers]
    recomputes = block.config.recompute_granularity == "full" and block.training and torch.is_grad_enabled()
    kept = {0: x_LBD} if 0 in taps else {}
    with getattr(block, "quantised_pass", nullcontext)():  # see fp8.py: delayed scales
        for layer in layers:
            number = layer.layer_number
            own = packing(number) if callable(packing) else packing
            if recomputes:
                x_LBD = checkpoint(_layer, layer, x_LBD, own, use_reentrant=False)
            else:
                x_LBD = _layer(layer, x_LBD, own)
            if after is not None:
                x_LBD = after(number, x_LBD)
            if number in taps:
                kept[number] = x_LBD
    return x_LBD, [kept[tap] for tap in taps]


def _layer(layer: Any, x_LBD: torch.Tensor, packing: Packing) -> torch.Tensor:
    out: torch.Tensor = layer(x_LBD, None, packed_seq_params=packing, padding_mask=packing.balance)[0]
    return out
