"""The Q-Former: learned queries read a picture's features through a BERT-like transformer (BLIP-2, https://arxiv.org/abs/2301.12597).

Numbers of transformers 5.23, models/blip_2 (`Blip2QFormerModel`), without dropout: post-norm layers in which the queries of a picture
attend to each other and, in every `cross_attention_frequency`-th layer, to the picture's features; then one linear map. With an
instruction (InstructBLIP, https://arxiv.org/abs/2305.06500; models/instructblip) queries and the words of the picture's text attend to
each other, and words have an MLP of their own.

Shape legend: T pictures, N features of all pictures, Q queries of a picture, M = T x Q queries of all pictures, W words of all pictures,
R = M + W rows picture after picture (queries, then words), D width of the Q-Former, H LLM width, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.config.projector import QFormerConfig
from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.layers.activations import ACTIVATIONS
from megavlm.models.layers.attention import attend_packed, backend_of
from megavlm.models.layers.configs import DTYPES, projector_transformer_config
from megavlm.models.layers.norms import LayerNorm
from megavlm.models.layers.packing import Packing, pack
from megavlm.models.projectors.arrange import arranged
from megavlm.models.projectors.perceiver import reading_packing
from megavlm.models.vision.features import Collect, Features, all_here
from megavlm.parallel.host import on_device


class QFormerProjector(MegatronModule):
    """Features -> `num_queries` visual tokens a picture, tensor-parallel over heads and inner widths, pictures of unequal size packed."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, parallel: ParallelConfig, device: torch.device) -> None:
        config = projector_transformer_config(model.vision, precision, parallel, device)
        super().__init__(config=config)
        qformer = model.projector.qformer
        assert qformer is not None, "the config sees to it"
        self.num_queries, width = qformer.num_queries, qformer.hidden_size
        self.query_tokens = torch.nn.Parameter(torch.empty(self.num_queries, width, dtype=DTYPES[precision.dtype], device=device))
        new: dict[str, Any] = {"dtype": DTYPES[precision.dtype], "device": device}
        self.instruction_embedding = self.position_embedding = None
        if qformer.instruction is not None:
            self.instruction_embedding = torch.nn.Embedding(qformer.instruction.vocab_size, width, **new)
            self.position_embedding = torch.nn.Parameter(torch.empty(qformer.instruction.max_positions, width, **new))
        self.norm = LayerNorm(config, width, qformer.norm_eps).to(device)
        self.layers = _Layers(config, qformer, model.feature_size, device)
        self.linear = ColumnParallelLinear(
            width, model.language.hidden_size, config=config, init_method=config.init_method, bias=True, gather_output=True
        )

    def forward(self, features: Features, rows_N: torch.Tensor | None = None, collect: Collect = all_here) -> torch.Tensor:
        """Visual tokens (M, H), picture after picture; `rows_N` and `collect` as in `MLPProjector.forward`."""
        rows = _Rows.of(features, self.num_queries)
        x_RD = self.query_tokens.repeat(len(features.lengths), 1)
        if self.instruction_embedding is not None and self.position_embedding is not None:
            assert features.instructions is not None, "pictures come with their instructions"
            ids_W, lengths = features.instructions
            places_W = torch.cat([torch.arange(length, device=ids_W.device) for length in lengths])
            x_RD = rows.joined(x_RD, self.instruction_embedding(ids_W) + self.position_embedding[places_W])
        x_RD = self.norm(x_RD)
        for layer in self.layers.children():
            x_RD = layer(x_RD, features.x_ND, rows)
        x_MD, _ = rows.apart(x_RD)
        return arranged(collect(self.linear(x_MD.unsqueeze(1))[0].squeeze(1)), rows_N)

    def untrained_parameters(self) -> set[torch.nn.Parameter]:
        """Parameters that no gradient can reach: what the last layer makes of words, nobody reads."""
        *_, last = self.layers.children()
        return set(last.words.parameters()) if last.words is not None else set()


@dataclass(frozen=True)
class _Rows:
    """Which rows are queries, which are words, and who sees whom."""

    queries_M: torch.Tensor | None
    """None: there are no words."""
    words_W: torch.Tensor | None
    order_R: torch.Tensor | None
    """Rows of queries and words, one set behind the other, in the order picture after picture."""
    among: Packing
    reading: Packing

    @classmethod
    def of(cls, features: Features, num_queries: int) -> _Rows:
        device, pictures = features.x_ND.device, len(features.lengths)
        reading = reading_packing(features.lengths, num_queries, device)
        if features.instructions is None:
            return cls(None, None, None, pack([num_queries] * pictures, device, causal=False), reading)
        lengths = features.instructions[1]
        if len(lengths) != pictures:
            raise ValueError(f"{pictures} tiles come with {len(lengths)} instructions: a Q-Former that reads text takes one tile a picture")
        kinds = [own for n in lengths for own in [True] * num_queries + [False] * n]
        queries_M, words_W = (on_device([row for row, own in enumerate(kinds) if own is it], device) for it in (True, False))
        order_R = torch.argsort(torch.cat([queries_M, words_W]))
        return cls(queries_M, words_W, order_R, pack([num_queries + n for n in lengths], device, causal=False), reading)

    def apart(self, x_RD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        return (x_RD, None) if self.queries_M is None else (x_RD[self.queries_M], x_RD[self.words_W])

    def joined(self, x_MD: torch.Tensor, y_WD: torch.Tensor | None) -> torch.Tensor:
        return x_MD if y_WD is None else torch.cat([x_MD, y_WD])[self.order_R]


class QFormerLayer(MegatronModule):
    """Queries attend to each other, in some layers to the picture, then an MLP; a norm after each."""

    def __init__(self, config: TransformerConfig, qformer: QFormerConfig, inputs: int, reads: bool, device: torch.device) -> None:
        super().__init__(config=config)
        width = qformer.hidden_size
        self.attention = QFormerAttention(config, qformer, width, device)
        self.reading = QFormerAttention(config, qformer, inputs, device) if reads else None
        self.mlp = QFormerMLP(config, qformer, device)
        self.words = QFormerMLP(config, qformer, device) if qformer.instruction is not None else None

    def forward(self, x_RD: torch.Tensor, features_ND: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """(R, D) after the layer."""
        x_MD, y_WD = rows.apart(self.attention(x_RD, x_RD, rows.among))
        if self.reading is not None:
            x_MD = self.reading(x_MD, features_ND, rows.reading)
        return rows.joined(self.mlp(x_MD), None if self.words is None else self.words(y_WD))


class QFormerMLP(MegatronModule):
    """Two linear layers with biases, added to what came in, then a norm."""

    def __init__(self, config: TransformerConfig, qformer: QFormerConfig, device: torch.device) -> None:
        super().__init__(config=config)
        self.up = _column(config, qformer.hidden_size, qformer.ffn_hidden_size)
        self.down = _row(config, qformer.ffn_hidden_size, qformer.hidden_size)
        self.norm = LayerNorm(config, qformer.hidden_size, qformer.norm_eps).to(device)
        self.activation = ACTIVATIONS[qformer.activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.activation(self.up(x.unsqueeze(1))[0])
        normed: torch.Tensor = self.norm(x + self.down(inner)[0].squeeze(1))
        return normed


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
        out = attend_packed(query, key, value, packing, causal=False, scale=self.head_width**-0.5, backend=backend_of(self.config)).flatten(
            1
        )
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
