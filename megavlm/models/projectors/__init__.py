"""Projectors: visual features -> the LLM's width. One file a kind; `build_projector` picks by `model.projector.kind`."""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.projectors.average_pool import AveragePoolProjector
from megavlm.models.projectors.mlp import MLPProjector
from megavlm.models.projectors.perceiver import PerceiverProjector
from megavlm.models.projectors.qformer import QFormerProjector

PROJECTORS: dict[str, type[MegatronModule]] = {
    "mlp": MLPProjector,
    "perceiver": PerceiverProjector,
    "average_pool": AveragePoolProjector,
    "qformer": QFormerProjector,
}


def build_projector(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> MegatronModule:
    """Every kind: forward(features, rows_N) -> visual tokens (N, LLM width), picture after picture; see `MLPProjector.forward`."""
    return PROJECTORS[model.projector.kind](model, precision, parallel, device)
