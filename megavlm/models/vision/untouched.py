"""The encoder's and the projector's part in a microbatch without a picture, where ranks reduce or gather while they compute."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megavlm.models.vision.encoder import VisionEncoder
from megavlm.parallel.touch import run_hooks, touch, touch_layer

BEHIND_LAYERS = ("final_norm", "pooling_head", "post_tile")
"""What an encoder reads after its layers, by the beginning of its name."""


def untouched_zero(vision: VisionEncoder, projector: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """A zero () whose backward pass gives every weight of encoder and projector a gradient of zero, in the order of a real one.

    No layer computes anything. Gradients and gathers come in the same order as on ranks with pictures: a layer's input carries a
    gradient here exactly where it does there, because collectives over ranks are matched by their order.
    """
    encoders = [m for m in vision.modules() if isinstance(m, VisionEncoder)]
    zero = torch.zeros((), device=device)
    for encoder in encoders:
        zero = zero + _encoder(encoder, torch.zeros((), device=device))
    for module in projector.modules():
        run_hooks(module)
    return touch(zero, projector.parameters())


def _encoder(encoder: VisionEncoder, zero: torch.Tensor) -> torch.Tensor:
    beside = [m for m in encoder.children() if isinstance(m, VisionEncoder)]
    skipped = {id(m) for other in beside for m in other.modules()} | {id(p) for other in beside for p in other.parameters()}
    layers = [m for m in encoder.modules() if isinstance(m, TransformerLayer) and id(m) not in skipped]
    skipped |= {id(m) for layer in layers for m in layer.modules()} | {id(p) for layer in layers for p in layer.parameters()}
    for module in encoder.modules():
        if id(module) not in skipped:
            run_hooks(module)
    own = [(name, p) for name, p in encoder.named_parameters() if id(p) not in skipped]
    zero = touch(zero, (p for name, p in own if not name.startswith(BEHIND_LAYERS)))
    unused = {id(p) for p in encoder.untrained_parameters()}
    for layer in layers:
        # What features never read is frozen, and no rank runs it.
        if not all(id(p) in unused for p in layer.parameters()):
            zero = touch_layer(zero, layer)
    return touch(zero, (p for name, p in own if name.startswith(BEHIND_LAYERS)))
