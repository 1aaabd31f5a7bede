"""The grid that a stage runs in, and whether its sequences fit the grid."""

from __future__ import annotations

from megavlm.config.schema import ParallelConfig, Recipe, StageConfig


def stage_layout(parallel: ParallelConfig, stage: StageConfig) -> ParallelConfig:
    """The grid a stage runs in.

    Encoder pretraining has no language model to cut into pipeline stages and no sequence to split: those ranks become
    data-parallel ones for the stage. The global batch is the same, and so is the loss.
    """
    if stage.objective != "vision_classification":
        return parallel
    return parallel.model_copy(update={"pipeline": 1, "virtual_pipeline": 1, "context": 1, "sequence": False})


def check_sequence_split(recipe: Recipe, stage: StageConfig, layout: ParallelConfig) -> None:
    """Raises ValueError when a microbatch's sequence does not split over context and sequence-parallel ranks."""
    if stage.objective == "vision_classification":
        return
    tokens = recipe.data.seq_len_tokens * stage.micro_batch_packs
    unit = (2 * layout.context if layout.context > 1 else 1) * (layout.tensor if layout.sequence else 1)
    if tokens % unit:
        raise ValueError(
            f"stage {stage.name!r}: a microbatch of {tokens} tokens (data.seq_len_tokens x micro_batch_packs) is not a multiple of "
            f"{unit} = 2 x parallel.context={layout.context} x parallel.tensor={layout.tensor}: change data.seq_len_tokens"
        )
