"""The parts of a model that gather, offload or recompute by themselves: its transformer layers and their experts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megavlm.models.layers.experts import Experts


def layer_units(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """Transformer layers of encoder and LLM, in the order in which they run."""
    return [m for name in ("vision", "language") for m in _layers(getattr(chunk, name, None))]


def expert_units(chunk: torch.nn.Module) -> list[torch.nn.Module]:
    """Experts of the LLM's layers, in the order in which they run."""
    return [m for m in chunk.modules() if isinstance(m, Experts)]


def _layers(part: torch.nn.Module | None) -> Iterator[torch.nn.Module]:
    return (m for m in part.modules() if isinstance(m, TransformerLayer)) if part is not None else iter(())
