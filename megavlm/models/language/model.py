"""Language model: megatron-core's GPTModel, fed with embeddings, with a head that only looks at target rows.

Shape legend: S packed sequence, L this rank's rows of it (after context and sequence parallelism), D width, Q targets.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.spec_utils import ModuleSpec

from megavlm.config.schema import LanguageConfig, ParallelConfig, PrecisionConfig
from megavlm.models.language.cross import cross_layer_spec
from megavlm.models.layers.attention import AttentionStyle
from megavlm.models.layers.configs import language_transformer_config
from megavlm.models.layers.experts import experts_spec
from megavlm.models.layers.packing import Packing
from megavlm.models.layers.run import AfterLayer, run_layers
from megavlm.models.layers.specs import LayerStyle, block_spec, layer_spec, post_of
from megavlm.parallel.context import ParallelContext
from megavlm.topology.pipeline import PipelineSplit
from megavlm_kernels.linear_cross_entropy import HeadLoss, linear_cross_entropy


class LanguageModel(GPTModel):
    """One pipeline chunk of the LLM. Positions are rotated inside the core attention, from the packing's tables."""

    def __init__(
        self,
        language: LanguageConfig,
        precision: PrecisionConfig,
        parallel: ParallelConfig,
        ctx: ParallelContext,
        chunk: int = 0,
        device: torch.device | None = None,
    ) -> None:
        first, last, vp_stage = ctx.chunk_position(chunk)
        config = language_transformer_config(language, precision, parallel, device or ctx.device)
        layers = language_layers(language, local=precision.wants_local_layers)
        self.language, self.ctx = language, ctx
        self.layers_of_model = PipelineSplit.of(language.num_layers, parallel).layers(ctx.pipeline_rank, chunk)
        """This chunk's layers, counted from 0 over all stages; an end of the pipeline may have none."""
        super().__init__(
            config,
            block_spec(config, layers, norm=language.norm, vp_stage=vp_stage),
            vocab_size=padded_vocab_size(language.num_tokens, parallel.tensor),
            max_sequence_length=language.max_positions,
            pre_process=first,
            post_process=last,
            share_embeddings_and_output_weights=language.tie_embeddings,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
            vp_stage=vp_stage,
        )
        # Not megatron-core's own table: features of pictures take their tokens' places before positions are added.
        self.position_embedding: torch.nn.Embedding | None = None
        if first and language.positions == "learned":
            rows, where = language.max_positions + language.position_offset, device or ctx.device
            self.position_embedding = torch.nn.Embedding(rows, language.hidden_size, dtype=config.params_dtype, device=where)

    def embed(self, tokens_S: torch.Tensor) -> torch.Tensor:
        """Token embeddings (S, 1, D), whole on every rank: visual features are merged before anything is split."""
        x: torch.Tensor = self.embedding(tokens_S[None], None)
        scale = self.language.embedding_scale
        return x if scale == 1.0 else x * torch.tensor(scale, dtype=x.dtype, device=x.device)

    def placed(self, x_SBD: torch.Tensor, positions_S: torch.Tensor) -> torch.Tensor:
        """A whole sequence (S, 1, D) with learned positions added; with rotary ones it is as it was."""
        if self.position_embedding is None:
            return x_SBD
        table_SD: torch.Tensor = self.position_embedding(positions_S + self.language.position_offset)
        return x_SBD + table_SD[:, None]

    def split(self, x_SBD: torch.Tensor, packing: Packing) -> torch.Tensor:
        """This rank's rows (L, 1, D) of a whole sequence."""
        if packing.context is not None:
            x_SBD = x_SBD[packing.context.rows_L]
        if self.config.sequence_parallel:
            x_SBD = scatter_to_sequence_parallel_region(x_SBD)
        return x_SBD

    @property
    def received(self) -> torch.Tensor:
        """What came from the stage before, through `set_input_tensor`."""
        x: torch.Tensor | None = self.decoder.input_tensor
        assert x is not None, "a later stage needs the hidden states of the one before"
        return x

    def add_rows(
        self, x_LBD: torch.Tensor, positions_N: torch.Tensor, rows_NBD: torch.Tensor, num_rows: int, packing: Packing
    ) -> torch.Tensor:
        """This rank's rows (L, 1, D) with `rows_NBD` added at `positions_N` of the whole sequence of `num_rows`."""
        rows_NBD = rows_NBD.to(x_LBD.dtype)
        if packing.context is None and not self.config.sequence_parallel:
            return x_LBD.index_add(0, positions_N, rows_NBD)
        whole_SBD = rows_NBD.new_zeros(num_rows, *rows_NBD.shape[1:]).index_add(0, positions_N, rows_NBD)
        return x_LBD + self.split(whole_SBD, packing)

    def transform(self, x_LBD: torch.Tensor, packing: Packing, after: AfterLayer | None = None) -> torch.Tensor:
        """Run this chunk's layers, and `after` behind each."""
        x_LBD, _ = run_layers(self.decoder, x_LBD, packing, after=after)
        return x_LBD if self.decoder.final_layernorm is None else self.decoder.final_layernorm(x_LBD)

    def head_weight(self) -> torch.Tensor:
        """This rank's rows of the output head (V, D)."""
        if self.share_embeddings_and_output_weights and self.pre_process:
            return self.shared_embedding_or_output_weight()  # the embedding has run in this very forward pass
        return weight_of(self.output_layer)

    def target_loss(
        self, x_LBD: torch.Tensor, rows_Q: torch.Tensor, target_Q: torch.Tensor, loss_weight_Q: torch.Tensor, z_loss: float = 0.0
    ) -> HeadLoss:
        """Weighted sum and loss of each target, of rows that are local to this context rank."""
        if self.config.sequence_parallel:
            hidden_QD = gather_from_sequence_parallel_region(x_LBD)[rows_Q, 0]  # backward sums the tensor ranks' parts
        else:
            hidden_QD = copy_to_tensor_model_parallel_region(x_LBD[rows_Q, 0])  # backward sums the tensor ranks' parts
        weight = self.head_weight()
        return linear_cross_entropy(
            hidden_QD,
            weight,
            target_Q,
            loss_weight_Q,
            vocab_size=self.language.vocab_size,
            vocab_start=self.ctx.tensor_rank * weight.shape[0],
            group=self.ctx.tensor_group,
            softcap=self.language.logit_softcap,
            z_loss=z_loss,
        )

    def logits(self, x_LBD: torch.Tensor, rows_Q: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (Q, vocab_size) in fp32 of the given rows (None: all), whole on every tensor rank."""
        if self.config.sequence_parallel:
            x_LBD = gather_from_sequence_parallel_region(x_LBD)
        hidden = x_LBD[:, 0] if rows_Q is None else x_LBD[rows_Q, 0]
        local = hidden @ self.head_weight().T
        if self.ctx.grid.tensor > 1:
            local = gather_from_tensor_model_parallel_region(local)
        logits, cap = local[:, : self.language.vocab_size].float(), self.language.logit_softcap
        return logits if cap is None else cap * torch.tanh(logits / cap)


def language_style(language: LanguageConfig) -> LayerStyle:
    """The LLM's layers by what its config says."""
    attention = AttentionStyle(
        scale=language.attention_scale,
        softcap=language.attention_softcap,
        window_tokens=language.sliding_window_tokens,
        window_layers=frozenset(layer + 1 for layer in language.sliding_layers),
        masked=language.bidirectional != "none",
        rotary_by_window=language.rope_local_theta is not None,
    )
    post = post_of(norm=language.norm if language.sandwich_norm else None)
    return LayerStyle(causal=True, norm=language.norm, qk_norm=language.qk_norm, post=post, attention=attention)


def language_layers(language: LanguageConfig, *, local: bool = False) -> ModuleSpec | list[ModuleSpec]:
    """One spec for all layers, or one for each; `local` as for `layer_spec`."""
    style = language_style(language)
    if language.cross_attention is not None:
        plain, reads = layer_spec(style, local=local), cross_layer_spec(language, local=local)
        return [reads if layer in language.cross_attention.layers else plain for layer in range(language.num_layers)]
    if language.moe is None:
        return layer_spec(style, local=local)
    dense, sparse = (layer_spec(s, local=local) for s in (style, replace(style, mlp=experts_spec())))
    return [dense if layer in language.moe.dense_layers else sparse for layer in range(language.num_layers)]


def weight_of(module: torch.nn.Module) -> torch.Tensor:
    """A module's weight, for use outside the module's own forward.

    Overlapped parameter gathering waits for a parameter in a hook before its owner's forward; a weight read past that
    hook is last step's, silently. So the hooks run here.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight


def padded_vocab_size(vocab_size: int, tensor: int, multiple: int = 8) -> int:
    """Smallest multiple of `multiple` x tensor that holds the vocabulary; padding rows stay zero and are never exported."""
    unit = multiple * tensor
    return -(-vocab_size // unit) * unit
