"""Several encoders on the same pixels, their features joined by channel (Prismatic, https://arxiv.org/abs/2402.07865).

Shape legend: N features of all pictures, D width of a feature.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.vision.canvas import CanvasEncoder
from megavlm.models.vision.encoder import VisionEncoder
from megavlm.models.vision.features import Features
from megavlm.models.vision.pictures import Grid


class SideBySide(VisionEncoder):
    """`model.vision` under its own checkpoint keys, and those of `model.vision_beside` as beside_0, beside_1, ..."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        super().__init__(model.vision, precision, parallel, device)
        for i, other in enumerate(model.vision_beside):
            # No ModuleList: megatron-core would store what is inside it as if every tensor rank held it whole.
            self.add_module(f"beside_{i}", VisionEncoder(other, precision, parallel, device))
        self.num_beside = len(model.vision_beside)

    @property
    def beside(self) -> list[VisionEncoder]:
        """All but `model.vision`."""
        encoders = [self.get_submodule(f"beside_{i}") for i in range(self.num_beside)]
        return [encoder for encoder in encoders if isinstance(encoder, VisionEncoder)]

    def forward(self, pixels: torch.Tensor, grids: Sequence[Grid] | None = None) -> Features:
        """Features (N, sum of all encoders' D), first those of `model.vision`. Pixels are uint8: each encoder normalises them itself."""
        first = super().forward(pixels, grids)
        others = [encoder(pixels, grids) for encoder in self.beside]
        return Features(torch.cat([first.x_ND, *(other.x_ND for other in others)], dim=-1), first.grids, first.lengths, first.deep)


def build_encoder(model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> VisionEncoder:
    """The encoder of a model, or all of them side by side."""
    if model.vision.canvas is not None:
        return CanvasEncoder(model.vision, precision, parallel, device)
    if model.vision_beside:
        return SideBySide(model, precision, parallel, device)
    return VisionEncoder(model.vision, precision, parallel, device)
