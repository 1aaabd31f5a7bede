"""The parts of a model that gather, offload or recompute by themselves: its transformer layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megavlm.models.vision import VisionEncoder


def layer_units(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """Transformer layers of encoder and LLM, in the order in which they run."""
    return [m for name in ("vision", "language") for m in _layers(getattr(chunk, name, None))]


def used_layers(vision: VisionEncoder) -> list[torch.nn.Module]:
    """Transformer layers of an encoder (and of those beside it) that its features come from, in the order in which they run."""
    unused = {id(p) for encoder in vision.modules() if isinstance(encoder, VisionEncoder) for p in encoder.untrained_parameters()}
    return [layer for layer in _layers(vision) if not all(id(p) in unused for p in layer.parameters())]


def _layers(part: torch.nn.Module | None) -> Iterator[torch.nn.Module]:
    return (m for m in part.modules() if isinstance(m, TransformerLayer)) if part is not None else iter(())
