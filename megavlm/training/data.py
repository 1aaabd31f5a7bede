"""Data of a run: tokenizer and indexes once, a stream per stage, fixed held-out batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.distributed as dist

from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.index import SampleIndex
from megavlm.data.loader import StageData
from megavlm.data.plan import StepPlanner, check_tasks
from megavlm.data.tokenizer import Tokenizer, load_tokenizer
from megavlm.data.types import SampleRef, StepData, StepPlan
from megavlm.parallel.context import ParallelContext
from megavlm.tracking.timers import part
from megavlm.training.indexes import build_on_rank_zero_first
from megavlm.training.layout import held_out_stage
from megavlm.training.state import RunState


class StageStream:
    """A stage's data as the loop sees them."""

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        indexes: dict[str, SampleIndex],
        tokenizer: Tokenizer,
        ctx: ParallelContext,
        state: RunState,
    ) -> None:
        self.tokenizer, self._indexes = tokenizer, indexes
        self.tasks = sorted({task for index in indexes.values() for task in index.task_names})
        check_tasks(stage, self.tasks)
        is_classification = stage.objective == "vision_classification"
        self.pack_tokens = stage.images_per_pack if is_classification else recipe.data.seq_len_tokens
        planner = make_planner(recipe, stage, indexes, ctx, seed=recipe.run.seed + state.stage_index, cursor=state.cursor)
        self.early_end = planner.early_end
        """What to tell before the first step when the data are expected to end before the stage's steps do."""
        self._data = open_stream(recipe, stage, indexes, tokenizer, ctx, planner)

    def next(self) -> StepData:
        """The next step's microbatches of this rank. Raises EndOfData, on all ranks at the same step."""
        return self._data.next()

    def count_images(self, plan: StepPlan) -> int:
        """Images of a step over all ranks."""
        rows: dict[str, list[int]] = {}
        for sample in _samples(plan):
            rows.setdefault(sample.source, []).append(sample.row)
        starts = {name: self._indexes[name].image_start for name in rows}
        return sum(int((starts[name][np.add(r, 1)] - starts[name][r]).sum()) for name, r in rows.items())

    def count_sources(self, plan: StepPlan) -> dict[str, int]:
        """Samples of each source in a step over all ranks."""
        return dict(sorted(Counter(s.source for s in _samples(plan)).items()))

    def close(self) -> None:
        """End the loading threads and processes."""
        self._data.close()


class RunData:
    """What all stages share."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.held_out_tasks: list[str] = []
        """Tasks of the held-out packs, which the stage's own sources need not have."""
        self._indexes: tuple[str, dict[str, SampleIndex]] | None = None
        """Of the stage that runs, or is about to."""
        self.tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.data.image_token)
        rows = self.tokenizer.num_rows(text_only=recipe.model.text_only)
        if rows > recipe.model.language.num_tokens:
            raise ValueError(
                f"{recipe.data.tokenizer} has {rows} tokens, but model.language.vocab_size is {recipe.model.language.vocab_size}: raise it"
            )

    def open_stage(self, stage: StageConfig, ctx: ParallelContext, state: RunState) -> StageStream:
        """The stage's stream, from the state's cursor on."""
        return StageStream(self.recipe, stage, self.indexes(stage), self.tokenizer, ctx, state)

    def indexes(self, stage: StageConfig) -> dict[str, SampleIndex]:
        """Indexes of the stage's sources, the same on every rank; the first rank builds what is missing, the others read it."""
        if self._indexes is None or self._indexes[0] != stage.name:
            self._indexes = stage.name, build_on_rank_zero_first(self.recipe, stage, stage.sources, self.tokenizer)
        return self._indexes[1]

    def held_out(self, stage: StageConfig, ctx: ParallelContext) -> list[StepData]:
        """The same held-out packs every time; empty when nothing is to be measured or the stage does not train the whole model."""
        measured = held_out_stage(self.recipe, stage)
        if measured is None:
            return []
        indexes = build_on_rank_zero_first(self.recipe, measured, self.recipe.evaluation.sources, self.tokenizer)
        self.held_out_tasks = sorted({task for index in indexes.values() for task in index.task_names})
        planner = make_planner(self.recipe, measured, indexes, ctx, seed=self.recipe.run.seed, cursor=None)
        stream = open_stream(self.recipe, measured, indexes, self.tokenizer, ctx, planner)
        try:
            return [stream.next()]
        finally:
            stream.close()


def make_planner(
    recipe: Recipe,
    stage: StageConfig,
    indexes: dict[str, SampleIndex],
    ctx: ParallelContext,
    *,
    seed: int,
    cursor: dict[str, object] | None,
) -> StepPlanner:
    """Plans a stage's steps, on every rank alike."""
    return StepPlanner(
        indexes,
        stage,
        recipe.data,
        recipe.model,
        seed=seed,
        dp_size=ctx.grid.data,
        num_microbatches=ctx.grid.num_microbatches(stage),
        cursor=cursor,
    )


def open_stream(
    recipe: Recipe, stage: StageConfig, indexes: dict[str, SampleIndex], tokenizer: Tokenizer, ctx: ParallelContext, planner: StepPlanner
) -> StageData:
    """Load a stage's planned data for this rank. All ranks call its `next` together: they agree on when too many samples are bad."""
    has_pictures = any(bool(index.num_tiles.any()) for index in indexes.values())  # the same on every rank
    return StageData(
        recipe,
        stage,
        indexes,
        tokenizer,
        planner,
        dp_rank=ctx.data_rank,
        needs_tiles=ctx.is_first_stage,
        check_images=ctx.is_last_stage,
        log_bad_samples=ctx.is_last_stage and ctx.tensor_rank == 0 and ctx.context_rank == 0,
        device=ctx.device,
        sum_over_ranks=partial(_sum_over_ranks, device=ctx.device) if has_pictures else None,
    )


def _sum_over_ranks(number: int, device: torch.device) -> int:
    value = torch.tensor([number], device=device)
    with part("communication"):  # of ranks whose data came later
        dist.all_reduce(value)
        return int(value.item())


def _samples(plan: StepPlan) -> Iterator[SampleRef]:
    return (s for rank in plan.assignment for microbatch in rank for pack in microbatch for s in pack.samples)
