"""The perceiver resampler: learned latents read the features of a picture of any size (Idefics2, https://arxiv.org/abs/2405.02246).

Numbers of transformers 5.23, models/idefics2 (`Idefics2Connector`): a gated MLP to the LLM's width, then layers in which latents attend to
the picture's features and to themselves.

Shape legend: T pictures, N features of all pictures, Q latents of a picture, M = T x Q latents of all pictures, H LLM width, K head width.
"""

from __future__ import annotations

from itertools import accumulate

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.projector import ResamplerConfig
from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.layers.activations import ACTIVATIONS
from megavlm.models.layers.attention import attend_packed, backend_of
from megavlm.models.layers.configs import DTYPES, projector_transformer_config
from megavlm.models.layers.masks import Piece
from megavlm.models.layers.norms import RMSNorm
from megavlm.models.layers.packing import Packing
from megavlm.models.projectors.arrange import arranged
from megavlm.models.projectors.shuffle import shuffled
from megavlm.models.vision.features import Collect, Features, all_here
from megavlm.parallel.host import on_device


class PerceiverProjector(MegatronModule):
    """Features -> `num_latents` visual tokens a picture, tensor-parallel over heads and inner widths, pictures of unequal size packed.

    Raises ValueError when the heads do not divide over the tensor ranks.
    """

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        config = projector_transformer_config(model.vision, precision, parallel, device)
        super().__init__(config=config)
        projector, resampler, width = model.projector, model.projector.resampler, model.language.hidden_size
        assert resampler is not None, "the config sees to it"
        check_heads(resampler, parallel.tensor)
        self.factor, self.num_latents = projector.pixel_shuffle, resampler.num_latents
        self.channels_first = projector.merged_order == "channels"
        inputs, inner = model.feature_size * self.factor**2, projector.hidden_size or width
        self.mlp = GatedMLP(config, inputs, inner, width, projector.activation)
        self.latents = torch.nn.Parameter(torch.empty(self.num_latents, width, dtype=DTYPES[precision.dtype], device=device))
        self.layers = _Layers(config, [PerceiverLayer(config, resampler, width, device) for _ in range(resampler.num_layers)])
        self.final_norm = RMSNorm(config, width, resampler.norm_eps).to(device)

    def forward(self, features: Features, rows_N: torch.Tensor | None = None, collect: Collect = all_here) -> torch.Tensor:
        """Visual tokens (M, H), picture after picture; `rows_N` and `collect` as in `MLPProjector.forward`."""
        context_NH = self.mlp(shuffled(features, self.factor, channels_first=self.channels_first))
        lengths = [length // self.factor**2 for length in features.lengths]
        packing = resampler_packing(lengths, self.num_latents, context_NH.device)
        x_MH = self.latents.repeat(len(lengths), 1)
        for layer in self.layers.children():
            x_MH = layer(x_MH, context_NH, lengths, packing)
        return arranged(collect(self.final_norm(x_MH)), rows_N)


class PerceiverLayer(MegatronModule):
    """Latents attend to a picture's features and to themselves; then a gated MLP."""

    def __init__(self, config: TransformerConfig, resampler: ResamplerConfig, width: int, device: torch.device) -> None:
        super().__init__(config=config)
        heads, groups, self.head_width = resampler.num_attention_heads, resampler.num_query_groups, resampler.head_dim
        self.latents_norm, self.context_norm, self.mlp_norm = (RMSNorm(config, width, resampler.norm_eps).to(device) for _ in range(3))
        column = {"config": config, "init_method": config.init_method, "bias": False, "gather_output": False}
        self.query = ColumnParallelLinear(width, heads * self.head_width, **column)
        self.key = ColumnParallelLinear(width, groups * self.head_width, **column)
        self.value = ColumnParallelLinear(width, groups * self.head_width, **column)
        self.output = row_parallel(config, heads * self.head_width, width)
        self.mlp = GatedMLP(config, width, resampler.ffn_hidden_size or 4 * width, width, resampler.activation)

    def forward(self, x_MH: torch.Tensor, context_NH: torch.Tensor, lengths: list[int], packing: Packing) -> torch.Tensor:
        """(M, H) after the layer; the context stays as it is."""
        normed_MH, seen = self.latents_norm(x_MH), self.context_norm(context_NH)
        seen = _each_with_latents(seen, lengths, normed_MH)
        query, key, value = (
            linear(x.unsqueeze(1))[0].squeeze(1).unflatten(-1, (-1, self.head_width))
            for linear, x in ((self.query, normed_MH), (self.key, seen), (self.value, seen))
        )
        out = attend_packed(query, key, value, packing, causal=False, scale=self.head_width**-0.5, backend=backend_of(self.config)).flatten(
            1
        )
        x_MH = x_MH + self.output(out.unsqueeze(1))[0].squeeze(1)
        return x_MH + self.mlp(self.mlp_norm(x_MH))


class GatedMLP(MegatronModule):
    """down(activation(gate(x)) x up(x)) without biases, (rows, inputs) -> (rows, outputs)."""

    def __init__(self, config: TransformerConfig, inputs: int, inner: int, outputs: int, activation: str) -> None:
        super().__init__(config=config)
        column = {"config": config, "init_method": config.init_method, "bias": False, "gather_output": False}
        self.gate, self.up = (ColumnParallelLinear(inputs, inner, **column) for _ in range(2))
        self.down = row_parallel(config, inner, outputs)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.unsqueeze(1)  # megatron-core's linear layers take (rows, batch, width)
        x, _ = self.down(self.activation(self.gate(x)[0]) * self.up(x)[0])
        return x.squeeze(1)


class _Layers(MegatronModule):
    """Layers by number; torch's ModuleList would be taken for whole on every tensor rank when it is stored."""

    def __init__(self, config: TransformerConfig, layers: list[PerceiverLayer]) -> None:
        super().__init__(config=config)
        for i, layer in enumerate(layers):
            self.add_module(str(i), layer)


def row_parallel(config: TransformerConfig, inputs: int, outputs: int) -> RowParallelLinear:
    """A row-parallel linear layer without bias, behind a column-parallel one."""
    return RowParallelLinear(
        inputs, outputs, config=config, init_method=config.init_method, bias=False, input_is_parallel=True, skip_bias_add=False
    )


def check_heads(resampler: ResamplerConfig, tensor: int) -> None:
    """Raise ValueError when the heads do not divide over the tensor ranks."""
    for name, heads in (("num_attention_heads", resampler.num_attention_heads), ("num_query_groups", resampler.num_query_groups)):
        if heads % tensor:
            raise ValueError(f"parallel.tensor={tensor} does not divide model.projector.resampler.{name}={heads}: use fewer tensor ranks")


def resampler_packing(lengths: list[int], num_latents: int, device: torch.device) -> Packing:
    """Each picture's latents see its own features and themselves."""
    return reading_packing([length + num_latents for length in lengths], num_latents, device)


def reading_packing(seen: list[int], num_latents: int, device: torch.device) -> Packing:
    """`num_latents` rows a picture, each of which sees all of the `seen` rows of its picture."""
    bounds = [0, *accumulate(seen)]
    packing = Packing(
        qkv_format="thd",
        cu_seqlens_q=torch.arange(len(seen) + 1, dtype=torch.int32, device=device) * num_latents,
        cu_seqlens_kv=on_device(bounds, device, torch.int32),
        max_seqlen_q=num_latents,
        max_seqlen_kv=max(seen),
    )
    packing.pieces = tuple(Piece(i * num_latents, num_latents, bounds[i], n, query_row=i * num_latents) for i, n in enumerate(seen))
    return packing


def _each_with_latents(context_NH: torch.Tensor, lengths: list[int], latents_MH: torch.Tensor) -> torch.Tensor:
    """Features of a picture, then its latents, picture after picture."""
    pictures = len(lengths)
    if len(set(lengths)) == 1:
        joined = torch.cat([context_NH.unflatten(0, (pictures, -1)), latents_MH.unflatten(0, (pictures, -1))], dim=1)
        return joined.flatten(0, 1)
    pairs = zip(context_NH.split(lengths), latents_MH.chunk(pictures), strict=True)
    return torch.cat([part for pair in pairs for part in pair])
