"""Run transformer layers one after another: what megatron-core's TransformerBlock.forward does, with hidden states from the middle.

Shape legend: L rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from torch.utils.checkpoint import checkpoint

from megavlm.models.layers.offload import Offloader, offloaded
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
    trains = block.training and torch.is_grad_enabled()
    # A full recomputation always says of how many layers.
    num_recomputed = block.config.recompute_num_layers if trains and block.config.recompute_granularity == "full" else 0
    num_offloaded = getattr(block.config, "offload_layers", 0) if trains else 0
    repeats_mlp = trains and getattr(block.config, "recompute_mlp", False)
    offloader = Offloader(x_LBD.device) if num_offloaded else None
    kept = {0: x_LBD} if 0 in taps else {}
    with getattr(block, "quantised_pass", nullcontext)():  # see fp8.py: delayed scales
        for place, layer in enumerate(layers):
            number = layer.layer_number
            own = packing(number) if callable(packing) else packing
            with offloaded(offloader if place < num_offloaded else None, layer, chain.from_iterable(own.rotary.values())):
                if place < num_recomputed:
                    x_LBD = checkpoint(_layer, layer, x_LBD, own, use_reentrant=False)
                else:
                    with _mlp_again(layer) if repeats_mlp else nullcontext():
                        x_LBD = _layer(layer, x_LBD, own)
            if after is not None:
                x_LBD = after(number, x_LBD)
            if number in taps:
                kept[number] = x_LBD
    return x_LBD, [kept[tap] for tap in taps]


def _layer(layer: Any, x_LBD: torch.Tensor, packing: Packing) -> torch.Tensor:
    out: torch.Tensor = layer(x_LBD, None, packed_seq_params=packing, padding_mask=packing.balance)[0]
    return out


@contextmanager
def _mlp_again(layer: Any) -> Iterator[None]:
    """While the layer runs, its MLP keeps its input only, and is computed again in the backward pass."""
    forward = layer.mlp.forward
    layer.mlp.forward = partial(checkpoint, forward, use_reentrant=False)
    try:
        yield
    finally:
        del layer.mlp.forward  # the class's own is there again
