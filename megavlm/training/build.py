"""Build what one stage trains: model chunks with their weights, data-parallel wrapping, optimizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megavlm.config.schema import ParallelConfig, Recipe, StageConfig
from megavlm.models.classifier import VisionClassifier
from megavlm.models.freezing import apply_freezing
from megavlm.models.layers.fp8 import apply_fp8
from megavlm.models.units import expert_units, layer_units
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import ParallelContext, entered_data_group, entered_expert_group
from megavlm.parallel.encoder_layout import finalize_gradients
from megavlm.parallel.sharded import ShardedDataParallel
from megavlm.planner.precision import choose_fp8
from megavlm.training.optimizer import build_optimizer
from megavlm_kernels.packed_attention import machine_of


@dataclass
class StageModel:
    """A stage's model in training form."""

    chunks: list[DistributedDataParallel] | list[ShardedDataParallel]
    """One per virtual pipeline chunk of this rank."""
    optimizer: MegatronOptimizer

    @property
    def modules(self) -> list[torch.nn.Module]:
        """The bare chunks."""
        return [chunk.module for chunk in self.chunks]


def build_chunks(recipe: Recipe, stage: StageConfig, parallel: ParallelConfig, ctx: ParallelContext) -> list[torch.nn.Module]:
    """The stage's bare model on this rank, weights unset, its products in the recipe's precision.

    Raises PrecisionError where this machine or the model cannot have that.
    """
    precision = recipe.precision
    backend = choose_fp8(recipe.model, precision, parallel, machine_of(ctx.device.type))
    if backend is not None:
        precision = precision.model_copy(update={"fp8_backend": backend})
    chunks: list[torch.nn.Module]
    if stage.objective == "vision_classification":
        assert stage.num_classes is not None
        chunks = [VisionClassifier(recipe.model, precision, parallel, ctx, stage.num_classes, stage.loss.z_loss)]
    else:
        text_only = stage.objective == "text"
        chunks = [
            VisionLanguageModel(recipe.model, precision, parallel, ctx, chunk, text_only=text_only, stage=stage)
            for chunk in range(parallel.virtual_pipeline)
        ]
    if backend is not None:
        for chunk in chunks:
            # Where parameters are gathered layer by layer (ZeRO-3), weights kept in FP8 would undo that.
            apply_fp8(chunk, precision, backend, caches=parallel.zero < 3)
    return chunks


def wrap_for_training(modules: list[torch.nn.Module], recipe: Recipe, stage: StageConfig, parallel: ParallelConfig) -> StageModel:
    """Freeze, wrap for data parallelism, build the optimizer. Weights must be in place: the optimizer copies them."""
    apply_freezing(modules, stage)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=recipe.precision.grad_reduce_in_fp32,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.zero == 1,
    )
    chunks = (
        _sharded(modules, ddp_config, parallel)
        if parallel.zero >= 2
        else [DistributedDataParallel(m.config, ddp_config, m, disable_bucketing=i > 0) for i, m in enumerate(modules)]
    )
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = finalize_gradients
        if parallel.overlap_grad_reduce or parallel.zero >= 2:
            no_sync = [c.no_sync for c in chunks]
            chunk.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    optimizer = build_optimizer(chunks, stage, recipe.precision, parallel)
    for chunk in chunks:
        # megatron-core's schedules multiply the loss by this before the backward pass.
        chunk.config.grad_scale_func = optimizer.scale_loss if recipe.precision.dtype == "fp16" else None
    return StageModel(chunks, optimizer)


def _sharded(
    modules: list[torch.nn.Module], ddp_config: DistributedDataParallelConfig, parallel: ParallelConfig
) -> list[ShardedDataParallel]:
    group = entered_data_group()
    # Expert ranks hold experts of their own: fewer ranks have copies of the same ones.
    expert_group = entered_expert_group() if parallel.expert > 1 else None
    device = next(parameter.device for module in modules for parameter in module.parameters())
    return [
        ShardedDataParallel(
            m.config,
            ddp_config,
            m,
            layer_units(m),
            group=group,
            device=device,
            keeps_gathered=parallel.zero == 2,
            experts=expert_units(m),
            expert_group=expert_group,
        )
        for m in modules
    ]
