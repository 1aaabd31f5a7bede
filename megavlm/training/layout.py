"""The grid that a stage runs in, and whether everything fits it."""

from __future__ import annotations

from collections.abc import Mapping

from megavlm.config.schema import ModelConfig, ParallelConfig, Recipe, StageConfig
from megavlm.config.tensor_split import encoder_tensor_ranks
from megavlm.data.plan import Index, StepPlanner
from megavlm.data.types import PackPlan
from megavlm.planner.attention import check_attention
from megavlm.planner.compiled import check_compiled
from megavlm.planner.context import check_context
from megavlm.planner.precision import check_fp8
from megavlm.planner.stages import PackShape, check_spread, settled
from megavlm.topology.grid import RankGrid
from megavlm.topology.pipeline import PipelineSplit


def stage_layout(parallel: ParallelConfig, stage: StageConfig, model: ModelConfig) -> ParallelConfig:
    """The grid a stage runs in.

    Encoder pretraining has no language model to cut into pipeline stages and no sequence to split: those ranks become
    data-parallel ones for the stage. So do its tensor ranks where the encoder is whole on each. The global batch is the same, and so is
    the loss.
    """
    if stage.objective != "vision_classification":
        return parallel
    alone = {"pipeline": 1, "virtual_pipeline": 1, "split": "even", "layers_per_stage": None, "context": 1, "expert": 1, "sequence": False}
    if encoder_tensor_ranks(model, parallel) == 1:
        alone["tensor"] = 1
    return parallel.model_copy(update=alone)


def check_run(recipe: Recipe, world_size: int) -> None:
    """All that can be known before anything is built: whether the recipe fits so many ranks, and this machine can compute it.

    Raises:
        ValueError: as `check_layouts`; or what the recipe asks of attention, context ranks, FP8 or compilation is not possible here.
    """
    check_layouts(recipe, world_size)
    check_attention(recipe)
    check_context(recipe)
    check_fp8(recipe)
    check_compiled(recipe)


def check_layouts(recipe: Recipe, world_size: int) -> None:
    """Check every stage against the grid before the first one starts: a mistake in the last must not cost the others.

    Raises:
        ValueError: ranks that do not form the grid, packs that do not spread over ranks and microbatches, layers that do not spread
            over pipeline stages, sequences that do not split, a profile of steps or ranks that there are not; each with its numbers.
    """
    _check_profile(recipe, world_size)
    for stage in recipe.stages:
        layout = stage_layout(recipe.parallel, stage, recipe.model)
        grid = RankGrid.from_config(layout, world_size)
        grid.num_microbatches(stage)
        if stage.objective == "vision_classification":
            continue
        if layout.split == "balanced":
            check_spread(recipe.model.language.num_layers, layout.pipeline, layout.virtual_pipeline)
        else:
            PipelineSplit.of(recipe.model.language.num_layers, layout)
        _check_sequence_split(recipe, stage, layout)
        if held_out := held_out_stage(recipe, stage):
            grid.num_microbatches(held_out)


def _check_profile(recipe: Recipe, world_size: int) -> None:
    profile, steps = recipe.tracking.profile, sum(stage.steps for stage in recipe.stages)
    if profile.first_step is None:
        return
    if profile.first_step > steps:
        raise ValueError(f"tracking.profile.first_step={profile.first_step}, and the recipe's stages have {steps} steps together")
    absent = [rank for rank in profile.trace_ranks if isinstance(rank, int) and rank >= world_size]
    if absent:
        raise ValueError(f"tracking.profile.trace_ranks names rank {absent[0]}, and there are {world_size} ranks, counted from 0")


def settled_layout(recipe: Recipe, number: int, layout: ParallelConfig, world_size: int, indexes: Mapping[str, Index]) -> ParallelConfig:
    """The layout of stage `number` with parallel.split=balanced turned into layers for each pipeline stage, by the packs of the stage's
    first step: the same on every rank, and the same again when the stage is resumed."""
    if layout.split != "balanced":
        return layout
    stage = recipe.stages[number]
    packs = first_packs(recipe, number, indexes) if layout.pipeline > 1 else []
    num_microbatches = RankGrid.from_config(layout, world_size).num_microbatches(stage)
    return settled(layout, recipe.model, stage, recipe.data, num_microbatches, packs)


def first_packs(recipe: Recipe, number: int, indexes: Mapping[str, Index]) -> list[PackShape]:
    """Packs of the first step of stage `number`, whatever the layout."""
    stage = recipe.stages[number]
    num_microbatches = stage.packs_per_step // stage.micro_batch_packs
    seed = recipe.run.seed + number
    planner = StepPlanner(indexes, stage, recipe.data, recipe.model, seed=seed, dp_size=1, num_microbatches=num_microbatches)
    return [shape_of(pack) for rank in planner.next().assignment for microbatch in rank for pack in microbatch]


def shape_of(pack: PackPlan) -> PackShape:
    """What of a planned pack costs anything."""
    return PackShape(pack.lengths_tokens, pack.vision, pack.num_targets)


def held_out_stage(recipe: Recipe, stage: StageConfig) -> StageConfig | None:
    """The stage as it measures held-out loss; None when nothing is measured or the stage does not train the whole model.

    Packs go through one by one on as many microbatches as there are: `evaluation.packs` is a global number, equal in every layout.
    """
    config = recipe.evaluation
    if not config.sources or config.every_steps is None or stage.objective != "multimodal":
        return None
    update = {"name": "evaluation", "mixture": dict.fromkeys(config.sources, 1.0), "packs_per_step": config.packs, "micro_batch_packs": 1}
    return stage.model_copy(update=update)


def _check_sequence_split(recipe: Recipe, stage: StageConfig, layout: ParallelConfig) -> None:
    """Raises ValueError when a microbatch's sequence does not split over sequence-parallel ranks; context ranks pad what they share."""
    tokens = recipe.data.seq_len_tokens * stage.micro_batch_packs
    if layout.sequence and layout.context == 1 and tokens % layout.tensor:
        raise ValueError(
            f"stage {stage.name!r}: a microbatch of {tokens} tokens (data.seq_len_tokens x micro_batch_packs) is not a multiple of "
            f"parallel.tensor={layout.tensor}, over which parallel.sequence=true splits it: change data.seq_len_tokens"
        )
