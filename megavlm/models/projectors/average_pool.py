"""The average-pooling projector: the mean of neighbouring patches, a norm, one linear map (Gemma 3).

Source: https://arxiv.org/abs/2503.19786, section 2.1; transformers 5.23, models/gemma3 (Gemma3MultiModalProjector).

Shape legend: N visual tokens, R rows that come out of the linear map, D feature width, H LLM width.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.module import MegatronModule

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.layers.configs import DTYPES, projector_transformer_config
from megavlm.models.layers.norms import RMSNorm
from megavlm.models.projectors.arrange import arranged
from megavlm.models.projectors.shuffle import shuffled
from megavlm.models.vision.features import Collect, Features, all_here


class AveragePoolProjector(MegatronModule):
    """Features -> (R, H); whole on every tensor rank, each of which computes its whole gradient."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        config = projector_transformer_config(model.vision, precision, parallel, device)
        config.layernorm_zero_centered_gamma = model.language.zero_centered_norm
        super().__init__(config=config)
        self.factor, width = model.projector.pixel_shuffle, model.feature_size
        self.norm = RMSNorm(config, width, eps=model.projector.norm_eps).to(device)
        # (D, H), as Hugging Face has it: not the weight of a torch linear layer.
        self.projection = torch.nn.Parameter(torch.empty(width, model.language.hidden_size, dtype=DTYPES[precision.dtype], device=device))

    def forward(self, features: Features, rows_N: torch.Tensor | None = None, collect: Collect = all_here) -> torch.Tensor:
        """Visual tokens (N, H), picture after picture; `rows_N` and `collect` as in `MLPProjector.forward`."""
        x_RFD = shuffled(features, self.factor).unflatten(-1, (self.factor**2, -1))
        return arranged(collect(self.norm(x_RFD.mean(1)) @ self.projection), rows_N)
