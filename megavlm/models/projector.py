"""Projector: visual features -> the LLM's width.

Shape legend: T tiles, F features of a tile, N visual tokens, D encoder width, H LLM width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.specs import LayerNorm, vision_transformer_config


def pixel_shuffle(x_TFD: torch.Tensor, factor: int) -> torch.Tensor:
    """Merge factor x factor neighbours into the channel dimension: (T, rows x columns, D) -> (T, rows x columns / factor^2, D x factor^2).

    Channels are ordered row within the block, column within the block, channel.
    """
    tiles, features, width = x_TFD.shape
    side = int(features**0.5)
    x = x_TFD.view(tiles, side // factor, factor, side // factor, factor, width)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(tiles, features // factor**2, factor * factor * width)


class Projector(MegatronModule):
    """(T, F, D) -> (N, H), one or two linear layers, tensor-parallel over the width between them."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        config: TransformerConfig = vision_transformer_config(model.vision, precision, parallel, device)
        super().__init__(config=config)
        projector, output_size = model.projector, model.language.hidden_size
        self.factor = projector.pixel_shuffle
        input_size = model.vision.hidden_size * self.factor**2
        self.input_norm = LayerNorm(config, input_size).to(device) if projector.input_norm else None
        linear = {"config": config, "init_method": config.init_method, "bias": projector.bias}
        if projector.num_layers == 1:
            self.linear_1 = ColumnParallelLinear(input_size, output_size, gather_output=True, **linear)
            self.linear_2 = None
        else:
            middle = projector.hidden_size or output_size
            self.linear_1 = ColumnParallelLinear(input_size, middle, gather_output=False, **linear)
            self.linear_2 = RowParallelLinear(middle, output_size, input_is_parallel=True, skip_bias_add=False, **linear)

    def forward(self, features_TFD: torch.Tensor) -> torch.Tensor:
        """Visual tokens, tile after tile."""
        x = features_TFD if self.factor == 1 else pixel_shuffle(features_TFD, self.factor)
        if self.input_norm is not None:
            x = self.input_norm(x)
        x = x.flatten(0, 1).unsqueeze(1)  # megatron-core's linear layers take (rows, batch, width)
        x, _ = self.linear_1(x)
        if self.linear_2 is not None:
            x, _ = self.linear_2(F.gelu(x))
        return x.squeeze(1)  # type: ignore[no-any-return]
