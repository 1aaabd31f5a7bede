"""The vision-language model: encoder -> projector -> features replace placeholders -> language model -> loss on targets.

The first pipeline stage holds encoder, projector and embeddings; every stage gets the same `PackedBatch`, and from the stage before
what models/handover.py describes. Submodules are
called `vision`, `projector` and `language`; checkpoint keys and freezing go by these names.

Shape legend: S packed sequence, L this rank's rows, N visual tokens, D width, Q targets.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule

from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig, StageConfig
from megavlm.config.tensor_split import encoder_tensor_ranks, projector_tensor_ranks
from megavlm.data.types import PackedBatch
from megavlm.models.handover import Sides, deepstack_side, join, pad, part, side_rows
from megavlm.models.language import LanguageModel
from megavlm.models.language.cross import PICTURES, sight_of
from megavlm.models.language.mrope import mrope_positions
from megavlm.models.language.rotary import rotary_tables
from megavlm.models.layers.experts import balance_of
from megavlm.models.layers.masks import groups_of
from megavlm.models.layers.packing import Packing, pack
from megavlm.models.layers.run import AfterLayer
from megavlm.models.projectors import build_projector
from megavlm.models.vision import VisionEncoder, build_encoder
from megavlm.models.vision.distributed import DealtPictures, build_in_layout, pixels_of
from megavlm.models.vision.features import Collect, all_here
from megavlm.models.vision.untouched import untouched_zero
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.step_parts import turn_on_gradient
from megavlm.topology.context import ContextLayout, context_layout
from megavlm.topology.pipeline import PipelineSplit
from megavlm.tracking.timers import part as time_part
from megavlm_kernels.scatter_features import scatter_features


class TargetLoss(NamedTuple):
    """What the last stage returns."""

    total: torch.Tensor
    """Sum of (loss + z-loss) x weight over this rank's targets; carries the gradient."""
    loss_Q: torch.Tensor
    """Cross-entropy of each of this rank's targets, without gradient."""
    z_total: torch.Tensor
    """What of the sum is z-loss, without gradient."""
    mine: torch.Tensor | slice
    """Which of the batch's targets these are: all of them, unless context parallelism splits the sequence."""


class VisionLanguageModel(MegatronModule):
    """One pipeline chunk of the model. With `text_only` the encoder and projector are not built."""

    def __init__(
        self,
        model: ModelConfig,
        precision: PrecisionConfig,
        parallel: ParallelConfig,
        ctx: ParallelContext,
        chunk: int = 0,
        *,
        text_only: bool = False,
        stage: StageConfig | None = None,
    ) -> None:
        """`stage` says how its loss is made, and what trains, for what depends on a picture's cost; None: the plain loss, everything."""
        language = LanguageModel(model.language, precision, parallel, ctx, chunk)
        super().__init__(config=language.config)
        self.pre_process, self.post_process, self.vp_stage = ctx.chunk_position(chunk)
        self.share_embeddings_and_output_weights = model.language.tie_embeddings
        self.model_type = ModelType.encoder_or_decoder
        self.model, self.ctx, self.context_split = model, ctx, parallel.context_split
        self.z_loss = 0.0 if stage is None else stage.loss.z_loss
        self.layers_of_first_chunk = PipelineSplit.of(model.language.num_layers, parallel).counts[0]
        # Where ranks reduce and gather while they compute, an image-less microbatch must take its part in the encoder's.
        self.touch_encoder = parallel.overlap_grad_reduce or parallel.zero >= 2
        has_encoder = self.pre_process and not (text_only or model.text_only)
        self.vision, self.projector, self.dealt = None, None, None
        self.whole_modules: tuple[str, ...] = ()
        if has_encoder:
            ranks = {"vision": encoder_tensor_ranks(model, parallel), "projector": projector_tensor_ranks(model, parallel)}
            self.whole_modules = tuple(f"{name}." for name, number in ranks.items() if number != ctx.grid.tensor)
            build = partial(build_in_layout, parallel=parallel, ctx=ctx)
            self.vision = build(ranks["vision"], build=lambda own: build_encoder(model, precision, own, ctx.device))
            self.projector = build(ranks["projector"], build=lambda own: build_projector(model, precision, own, ctx.device))
            if parallel.encoder_data_parallel is not False and ctx.grid.tensor * ctx.grid.context > 1:
                self.dealt = DealtPictures(model, parallel, ctx, self.config.params_dtype, stage)
        self.language = language

    def set_input_tensor(self, tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Hidden states from the previous pipeline stage."""
        self.language.set_input_tensor(tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor:
        """The weight that embedding and head share; megatron-core sums its gradients over first and last stage."""
        return self.language.shared_embedding_or_output_weight()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> ShardedStateDict:
        """Of modules that are whole on every tensor rank the first one's copy is the one to be stored."""
        state: ShardedStateDict = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for base in nested_values(state):
            if base.key.removeprefix(prefix).startswith(self.whole_modules or ("-",)):
                first, _, copy = base.replica_id
                base.replica_id = (first, self.ctx.tensor_rank, copy)
        return state

    def summed_over_tensor(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of which each tensor rank has the gradient of its own pictures only (parallel/encoder_layout.py)."""
        if self.dealt is None:
            return
        for name, parameter in self.named_parameters():
            # The end of a row is put in where all pictures are together again: every tensor rank has its whole gradient.
            if name.startswith(("vision.", "projector.")) and name != "projector.image_newline":
                yield parameter

    def copied_over_tensor(self) -> Iterator[torch.nn.Parameter]:
        """Parameters of modules that are whole on every tensor rank, where each computes their whole gradient from the same pictures."""
        if self.dealt is None and self.whole_modules:
            yield from (parameter for name, parameter in self.named_parameters() if name.startswith(self.whole_modules))

    def keep_own_pictures(self, batch: PackedBatch) -> PackedBatch:
        """The batch without the pixels that other ranks encode."""
        return batch if self.dealt is None or not batch.num_tiles else self.dealt.keep_own(batch)

    def forward(self, batch: PackedBatch, message_rows: int = 0) -> torch.Tensor | TargetLoss:
        """Losses on the last stage; before it what the next stage needs (R, 1, D), padded to `message_rows` where these are more."""
        packing = self.packing(batch)
        hidden = self.transform(batch, packing)
        if not self.post_process:
            return pad(hidden, max(message_rows, hidden.shape[0]))
        with time_part("head"):
            rows, mine = local_targets(batch.target_positions_Q, packing)
            found = self.language.target_loss(hidden, rows, batch.target_ids_Q[mine], batch.target_weights_Q[mine], self.z_loss)
        return TargetLoss(*found, mine)

    def transform(self, batch: PackedBatch, packing: Packing) -> torch.Tensor:
        """Hidden states (L, 1, D) after this chunk's layers; before the last stage with the side rows that the next ones need (R, 1, D)."""
        layers = self.language.layers_of_model
        if self.pre_process:
            x, packing.sides = self.merge(batch)
            x = self.language.split(self.language.placed(x, batch.positions_S), packing)
        else:
            x, packing.sides = part(self.language.received, self.local_rows(batch), side_rows(self.model, batch, layers.start))
        x = self.language.transform(x, packing, self._deepstack(batch, packing))
        return x if self.post_process else join(x, packing.sides, side_rows(self.model, batch, layers.stop))

    def local_rows(self, batch: PackedBatch) -> int:
        """L: rows of the batch that this rank's layers see."""
        context = self.context(batch)
        rows = batch.num_tokens if context is None else context[0].num_rows
        return rows // self.ctx.grid.tensor if self.config.sequence_parallel else rows

    def context(self, batch: PackedBatch) -> tuple[ContextLayout, int] | None:
        """How the batch is split over context ranks, and this rank's number among them; None: there is one rank."""
        if self.ctx.grid.context == 1:
            return None
        multiple = self.ctx.grid.tensor if self.config.sequence_parallel else 1
        return context_layout(tuple(batch.segment_lengths), self.context_split, self.ctx.grid.context, multiple), self.ctx.context_rank

    def message_rows(self, batch: PackedBatch) -> int:
        """R: most rows that one stage sends to the next for this batch; side rows only become fewer from stage to stage."""
        return self.local_rows(batch) + sum(side_rows(self.model, batch, self.layers_of_first_chunk).values())

    def embed(self, batch: PackedBatch) -> torch.Tensor:
        """Token embeddings (S, 1, D) with visual features in the place of their placeholders."""
        return self.merge(batch)[0]

    def merge(self, batch: PackedBatch) -> tuple[torch.Tensor, Sides]:
        """(token embeddings (S, 1, D) with visual features in the place of their placeholders, side rows for the layers)."""
        x = self.language.embed(batch.tokens_S)
        if batch.num_tiles == 0:
            if self.touch_encoder and self.vision is not None and self.projector is not None:
                x = x + untouched_zero(self.vision, self.projector, x.device).to(x.dtype)
            return x, self._no_sides(batch)
        if self.vision is None or self.projector is None:
            raise ValueError(f"this batch has {batch.num_tiles} image tiles, but the stage's objective is text: use samples without images")
        features_ND, sides = self._visual_tokens(batch, self.vision, self.projector)
        if self.model.language.cross_attention is not None:
            return x, self._read_pictures(batch, features_ND)
        if features_ND.shape[0] != batch.image_positions_N.numel():
            raise ValueError(
                f"{batch.image_positions_N.numel()} image placeholders, but {features_ND.shape[0]} visual features "
                f"of {batch.num_tiles} tiles or pictures: the data were prepared for another model.vision or model.projector"
            )
        return scatter_features(x, features_ND.unsqueeze(1), batch.image_positions_N), sides

    def _read_pictures(self, batch: PackedBatch, features_MD: torch.Tensor) -> Sides:
        """Side rows for layers that read pictures; their tokens stay in the text as they are."""
        wanted = side_rows(self.model, batch, 0)[PICTURES]
        if features_MD.shape[0] != wanted:
            raise ValueError(
                f"{features_MD.shape[0]} visual features of {batch.num_tiles} tiles or pictures, where the batch's pictures have {wanted}: "
                "the data were prepared for another model.vision or model.projector"
            )
        return {PICTURES: features_MD.unsqueeze(1)}

    def _no_sides(self, batch: PackedBatch) -> Sides:
        """Side tensors without a row, for a microbatch without a picture."""
        width = self.model.language.hidden_size
        empty = torch.empty(0, 1, width, dtype=self.config.params_dtype, device=self.ctx.device)
        return dict.fromkeys(side_rows(self.model, batch, 0), empty)

    def _visual_tokens(self, batch: PackedBatch, vision: VisionEncoder, projector: MegatronModule) -> tuple[torch.Tensor, Sides]:
        """(N, D), by whichever policy of data.image made the batch; and side rows, of which there are N for each DeepStack layer."""
        collect: Collect = all_here
        if self.dealt is not None:
            own, collect = self.dealt.own(batch)
        else:
            own = pixels_of(batch, by_picture=self.model.vision.canvas is not None)
        with time_part("encoder"):
            features = vision(own.pixels, own.grids)
        features.instructions = own.instructions
        with time_part("projector"):
            tokens_ND: torch.Tensor = projector(features, batch.feature_rows_N, collect)
            deep = projector.deep(features, batch.feature_rows_N, collect) if features.deep else []
        turn_on_gradient(tokens_ND, "encoder_backward")
        return tokens_ND, {deepstack_side(i): rows_ND.unsqueeze(1) for i, rows_ND in enumerate(deep)}

    def _deepstack(self, batch: PackedBatch, packing: Packing) -> AfterLayer | None:
        """What adds features from the middle of the encoder to the visual tokens behind the LLM's first layers."""
        count = len(self.model.vision.deepstack_layers)
        if self.model.text_only or not count or batch.num_tiles == 0:
            return None

        def add(layer_number: int, x_LBD: torch.Tensor) -> torch.Tensor:
            if layer_number > count:
                return x_LBD
            rows_NBD = packing.sides[deepstack_side(layer_number - 1)]
            return self.language.add_rows(x_LBD, batch.image_positions_N, rows_NBD, batch.num_tokens, packing)

        return add

    def _axes(self, batch: PackedBatch) -> torch.Tensor | None:
        """(3, S): time, row and column of each token, where the LLM tells these apart and there are pictures."""
        if self.model.language.mrope_sections is None or batch.num_tiles == 0:
            return None
        grids = self.model.visual_grids(batch.tile_grids, batch.num_tiles)
        return mrope_positions(batch.positions_S, batch.image_positions_N, grids)

    def packing(self, batch: PackedBatch) -> Packing:
        """Segments and rotations of this batch for the LLM's attention."""
        language = self.model.language
        context = self.context(batch)
        packing = pack(
            batch.segment_lengths,
            batch.tokens_S.device,
            causal=True,
            context=context,
            rotary=rotary_tables(language, batch.positions_S, self.config.params_dtype, batch.segment_lengths, self._axes(batch)),
            groups=groups_of(
                language.bidirectional,
                batch.segment_lengths,
                [sample is not None for sample in batch.segment_samples],
                batch.target_positions_Q,
                batch.target_segments_Q,
                batch.image_rows_N,
            ),
        )
        if language.cross_attention is not None:
            packing.sight = sight_of(self.model, batch, context)
        if language.moe is not None and language.moe.aux_loss and self.training:
            is_sample = [sample is not None for sample in batch.segment_samples]
            packing.balance = balance_of(batch.segment_lengths, is_sample, batch.target_weights_Q, packing.context)
        return packing


def local_targets(positions_Q: torch.Tensor, packing: Packing) -> tuple[torch.Tensor, torch.Tensor | slice]:
    """Rows of this context rank's part that are targets, and which targets these are."""
    return (positions_Q, slice(None)) if packing.context is None else packing.context.local_targets(positions_Q)
