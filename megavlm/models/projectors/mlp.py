"""The MLP projector: one to three linear layers on each visual feature, after merging neighbours where the family does.

Shape legend: N features, R rows that come out of the layers, D feature width, H LLM width.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.layers.activations import ACTIVATIONS
from megavlm.models.layers.configs import DTYPES, projector_transformer_config
from megavlm.models.layers.norms import NORMS, LayerNorm
from megavlm.models.projectors.arrange import arranged
from megavlm.models.projectors.shuffle import shuffled
from megavlm.models.vision.features import Collect, Features, all_here


class Merger(MegatronModule):
    """Merging and the linear layers, tensor-parallel over the width between these."""

    def __init__(
        self,
        model: ModelConfig,
        config: TransformerConfig,
        device: torch.device,
        *,
        input_size: int,
        patch_norm: str | None,
        input_norm: bool,
    ) -> None:
        super().__init__(config=config)
        projector, output_size = model.projector, model.language.hidden_size
        self.factor, self.activation = projector.pixel_shuffle, ACTIVATIONS[projector.activation]
        self.patch_norm = self.input_norm = None
        if patch_norm is not None:
            self.patch_norm = NORMS[patch_norm](config, input_size, projector.norm_eps).to(device)
        merged_size = input_size * self.factor**2
        self.merge_linear = None
        self.channels_first = projector.merged_order == "channels"
        if projector.merge_linear:
            unbiased = {"config": config, "init_method": config.init_method, "bias": False}
            self.merge_linear = ColumnParallelLinear(merged_size, input_size, gather_output=True, **unbiased)
        else:
            input_size = merged_size
        if input_norm:
            self.input_norm = LayerNorm(config, input_size, projector.norm_eps).to(device)
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

    def merged(self, features: Features) -> torch.Tensor:
        """(R, H), picture after picture."""
        if self.patch_norm is not None:
            features = replace(features, x_ND=self.patch_norm(features.x_ND))
        x = shuffled(features, self.factor, channels_first=self.channels_first)
        if self.merge_linear is not None:
            x = self.merge_linear(x.unsqueeze(1))[0].squeeze(1)
        if self.input_norm is not None:
            x = self.input_norm(x)
        x = x.unsqueeze(1)  # megatron-core's linear layers take (rows, batch, width)
        x, _ = self.linear_1(x)
        for linear in (self.linear_2, self.linear_3):
            if linear is not None:
                x, _ = linear(self.activation(x))
        return x.squeeze(1)

    def forward(self, features: Features) -> torch.Tensor:
        """As `merged`."""
        return self.merged(features)


class MLPProjector(Merger):
    """Features -> (R, H); then, with LLaVA-NeXT's grids, the rows of tiles are put into the order of the picture with a learned
    `image_newline` at the end of each. With vision.deepstack_layers one more merger for each of these layers, normed after merging."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        config, projector = projector_transformer_config(model.vision, precision, parallel, device), model.projector
        own = {"input_size": model.feature_size, "patch_norm": projector.patch_norm, "input_norm": projector.input_norm}
        super().__init__(model, config, device, **own)  # type: ignore[arg-type]
        deep = {"input_size": model.vision.hidden_size, "patch_norm": None, "input_norm": True}
        self.num_deep = len(model.vision.deepstack_layers)
        for i in range(self.num_deep):
            # No ModuleList: megatron-core would store what is inside it as if every tensor rank held it whole.
            self.add_module(f"deepstack_{i}", Merger(model, config, device, **deep))  # type: ignore[arg-type]
        self.image_newline = None
        if projector.image_newline:
            # Whole on every tensor rank; each computes its whole gradient, as for biases.
            self.image_newline = torch.nn.Parameter(torch.empty(model.language.hidden_size, dtype=DTYPES[precision.dtype], device=device))

    def forward(self, features: Features, rows_N: torch.Tensor | None = None, collect: Collect = all_here) -> torch.Tensor:
        """Visual tokens (N, H), picture after picture.

        `rows_N` says which row of the layers' result each token takes, -1 being the image_newline; None: all rows in order. `collect`
        brings rows of other ranks' pictures before that.
        """
        return arranged(collect(self.merged(features)), rows_N, self.image_newline)

    def deep(self, features: Features, rows_N: torch.Tensor | None = None, collect: Collect = all_here) -> list[torch.Tensor]:
        """For each of vision.deepstack_layers, what is added to the visual tokens (N, H) further up; others as in `forward`."""
        assert len(features.deep) == self.num_deep
        mergers = [self.get_submodule(f"deepstack_{i}") for i in range(self.num_deep)]
        return [arranged(collect(merger(replace(features, x_ND=x))), rows_N) for merger, x in zip(mergers, features.deep, strict=True)]
