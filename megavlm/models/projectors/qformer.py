"""The Q-Former: learned queries read a picture's features through a BERT-like transformer (BLIP-2, https://arxiv.org/abs/2301.12597).

Numbers of transformers 5.23, models/blip_2 (`Blip2QFormerModel`), without dropout: post-norm layers in which the queries of a picture
attend to each other and, in every `cross_attention_frequency`-th layer, to the picture's features; then one linear map.

Shape legend: T pictures, N features of all pictures, Q queries of a picture, M = T x Q queries of all pictures, D width of the Q-Former,
H LLM width, K head width.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.projector import QFormerConfig
from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.layers.activations import ACTIVATIONS
from megavlm.models.layers.attention import attend_packed
from megavlm.models.layers.configs import DTYPES, vision_transformer_config
from megavlm.models.layers.norms import LayerNorm
from megavlm.models.layers.packing import Packing
from megavlm.models.projectors.arrange import arranged
from megavlm.models.projectors.perceiver import reading_packing
from megavlm.models.vision.features import Features


class QFormerProjector(MegatronModule):
    """Features -> `num_queries` visual tokens a picture, tensor-parallel over heads and inner widths, pictures of unequal size packed."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        config = vision_transformer_config(model.vision, precision, parallel, device)
        super().__init__(config=config)
        qformer = model.projector.qformer
        assert qformer is not None, "the config sees to it"
        self.num_queries, width = qformer.num_queries, qformer.hidden_size
        self.query_tokens = torch.nn.Parameter(torch.empty(self.num_queries, width, dtype=DTYPES[precision.dtype], device=device))
        self.norm = LayerNorm(config, width, qformer.norm_eps).to(device)
        self.layers = _Layers(config, qformer, model.feature_size, device)
        self.linear = ColumnParallelLinear(
            width, model.language.hidden_size, config=config, init_method=config.init_method, bias=True, gather_output=True
        )

    def forward(self, features: Features, rows_N: torch.Tensor | None = None) -> torch.Tensor:
        """Visual tokens (M, H), picture after picture; `rows_N` as in `MLPProjector.forward`."""
        lengths, device = features.lengths, features.x_ND.device
        among = reading_packing([self.num_queries] * len(lengths), self.num_queries, device)
        reading = reading_packing(lengths, self.num_queries, device)
        x_MD = self.norm(self.query_tokens).repeat(len(lengths), 1)
        for layer in self.layers.children():
            x_MD = layer(x_MD, features.x_ND, among, reading)
        return arranged(self.linear(x_MD.unsqueeze(1))[0].squeeze(1), rows_N)


class QFormerLayer(MegatronModule):
    """Queries attend to each other, in some layers to the picture, then an MLP; a norm after each."""

    def __init__(self, config: TransformerConfig, qformer: QFormerConfig, inputs: int, reads: bool, device: torch.device) -> None:
        super().__init__(config=config)
        width = qformer.hidden_size
        self.attention = QFormerAttention(config, qformer, width, device)
        self.reading = QFormerAttention(config, qformer, inputs, device) if reads else None
        self.up = _column(config, width, qformer.ffn_hidden_size)
        self.down = _row(config, qformer.ffn_hidden_size, width)
        self.norm = LayerNorm(config, width, qformer.norm_eps).to(device)
        self.activation = ACTIVATIONS[qformer.activation]

    def forward(self, x_MD: torch.Tensor, features_ND: torch.Tensor, among: Packing, reading: Packing) -> torch.Tensor:
        """(M, D) after the layer. `among` and `reading` say which queries and features each query sees."""
        x_MD = self.attention(x_MD, x_MD, among)
        if self.reading is not None:
            x_MD = self.reading(x_MD, features_ND, reading)
        inner = self.activation(self.up(x_MD.unsqueeze(1))[0])
        out_MD: torch.Tensor = self.norm(x_MD + self.down(inner)[0].squeeze(1))
        return out_MD


class QFormerAttention(MegatronModule):
    """Attention with biases, added to what came in, then a norm."""

    def __init__(self, config: TransformerConfig, qformer: QFormerConfig, inputs: int, device: torch.device) -> None:
        super().__init__(config=config)
        width = qformer.hidden_size
        self.head_width = width // qformer.num_attention_heads
        self.query, self.key, self.value = _column(config, width, width), _column(config, inputs, width), _column(config, inputs, width)
        self.output = _row(config, width, width)
        self.norm = LayerNorm(config, width, qformer.norm_eps).to(device)

    def forward(self, x_MD: torch.Tensor, seen: torch.Tensor, packing: Packing) -> torch.Tensor:
        """(M, D); keys and values come from `seen`, whose rows `packing` gives to the queries."""
        query, key, value = (
            linear(x.unsqueeze(1))[0].squeeze(1).unflatten(-1, (-1, self.head_width))
            for linear, x in ((self.query, x_MD), (self.key, seen), (self.value, seen))
        )
        out = attend_packed(query, key, value, packing, causal=False, scale=self.head_width**-0.5).flatten(1)
        normed: torch.Tensor = self.norm(x_MD + self.output(out.unsqueeze(1))[0].squeeze(1))
        return normed


class _Layers(MegatronModule):
    """Layers by number; torch's ModuleList would be taken for whole on every tensor rank when it is stored."""

    def __init__(self, config: TransformerConfig, qformer: QFormerConfig, inputs: int, device: torch.device) -> None:
        super().__init__(config=config)
        for layer in range(qformer.num_layers):
            reads = layer % qformer.cross_attention_frequency == 0
            self.add_module(str(layer), QFormerLayer(config, qformer, inputs, reads, device))


def _column(config: TransformerConfig, inputs: int, outputs: int) -> ColumnParallelLinear:
    return ColumnParallelLinear(inputs, outputs, config=config, init_method=config.init_method, bias=True, gather_output=False)


def _row(config: TransformerConfig, inputs: int, outputs: int) -> RowParallelLinear:
    return RowParallelLinear(
        inputs, outputs, config=config, init_method=config.init_method, bias=True, input_is_parallel=True, skip_bias_add=False
    )
