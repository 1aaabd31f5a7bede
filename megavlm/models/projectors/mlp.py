"""The MLP projector: one to three linear layers on each visual feature, after merging neighbours where the family does.

Shape legend: N features, R rows that come out of the layers, D feature width, H LLM width.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.layers.activations import ACTIVATIONS
from megavlm.models.layers.configs import DTYPES, vision_transformer_config
from megavlm.models.layers.norms import LayerNorm
from megavlm.models.projectors.arrange import arranged
from megavlm.models.projectors.shuffle import shuffled
from megavlm.models.vision.features import Features


class MLPProjector(MegatronModule):
    """Features -> (R, H), tensor-parallel over the width between the layers; then, with LLaVA-NeXT's grids, the rows of tiles are put
    into the order of the picture with a learned `image_newline` at the end of each."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        config = vision_transformer_config(model.vision, precision, parallel, device)
        super().__init__(config=config)
        projector, output_size = model.projector, model.language.hidden_size
        self.factor, self.activation = projector.pixel_shuffle, ACTIVATIONS[projector.activation]
        input_size = model.vision.feature_size * self.factor**2
        self.input_norm = LayerNorm(config, input_size).to(device) if projector.input_norm else None
        linear = {"config": config, "init_method": config.init_method, "bias": projector.bias}
        middle = projector.hidden_size or output_size
        self.linear_2 = self.linear_3 = None
        if projector.num_layers == 1:
            self.linear_1 = ColumnParallelLinear(input_size, output_size, gather_output=True, **linear)
        else:
            self.linear_1 = ColumnParallelLinear(input_size, middle, gather_output=False, **linear)
            last = middle if projector.num_layers == 3 else output_size
            self.linear_2 = RowParallelLinear(middle, last, input_is_parallel=True, skip_bias_add=False, **linear)
        if projector.num_layers == 3:
            self.linear_3 = ColumnParallelLinear(middle, output_size, gather_output=True, **linear)
        self.image_newline = None
        if projector.image_newline:
            # Whole on every tensor rank; each computes its whole gradient, as for biases.
            self.image_newline = torch.nn.Parameter(torch.empty(output_size, dtype=DTYPES[precision.dtype], device=device))

    def forward(self, features: Features, rows_N: torch.Tensor | None = None) -> torch.Tensor:
        """Visual tokens (N, H), picture after picture.

        `rows_N` says which row of the layers' result each token takes, -1 being the image_newline; None: all rows in order.
        """
        x = shuffled(features, self.factor)
        if self.input_norm is not None:
            x = self.input_norm(x)
        x = x.unsqueeze(1)  # megatron-core's linear layers take (rows, batch, width)
        x, _ = self.linear_1(x)
        for linear in (self.linear_2, self.linear_3):
            if linear is not None:
                x, _ = linear(self.activation(x))
        return arranged(x.squeeze(1), rows_N, self.image_newline)
