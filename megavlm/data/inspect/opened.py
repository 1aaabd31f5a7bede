"""A stage's data opened for looking: tokenizer, indexes and a planner, as a run would build them."""

from __future__ import annotations

from dataclasses import dataclass

from megavlm.config.errors import RecipeError
from megavlm.config.fields import did_you_mean
from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.index import SampleIndex, build_index
from megavlm.data.plan import StepPlanner
from megavlm.data.tokenizer import Tokenizer, load_tokenizer


@dataclass
class OpenStage:
    """What looking at a stage needs."""

    recipe: Recipe
    stage: StageConfig
    tokenizer: Tokenizer
    indexes: dict[str, SampleIndex]
    seed: int
    """The stage's own, as the run has it."""

    def planner(self, dp_size: int) -> StepPlanner:
        """Plans the stage from its beginning, for any data-parallel size that its packs can be dealt out to."""
        num_microbatches = self.stage.packs_per_step // (dp_size * self.stage.micro_batch_packs)
        return StepPlanner(
            self.indexes,
            self.stage,
            self.recipe.data,
            self.recipe.model,
            seed=self.seed,
            dp_size=dp_size,
            num_microbatches=num_microbatches,
        )

    @property
    def capacity(self) -> int:
        """Tokens of a pack; vision_classification: pictures."""
        return self.stage.images_per_pack if self.stage.objective == "vision_classification" else self.recipe.data.seq_len_tokens


def find_stage(recipe: Recipe, name: str | None, where: str) -> int:
    """Place of a stage in the recipe; None: the first.

    Raises:
        RecipeError: the recipe (called `where` in the message) has no such stage.
    """
    names = [stage.name for stage in recipe.stages]
    if name is None:
        return 0
    if name not in names:
        raise RecipeError(where, f"no stage {name!r}{did_you_mean(name, names)} (it has: {', '.join(names) or 'none'})")
    return names.index(name)


def open_stage(recipe: Recipe, number: int, progress: bool = True) -> OpenStage:
    """Tokenizer and indexes of one stage; indexes come from their cache where a run or `megavlm data index` left them.

    Raises:
        ValueError: what the run itself would refuse: no tokenizer, missing shards, samples over the budget.
    """
    stage = recipe.stages[number]
    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.data.image_token)
    indexes = {
        name: build_index(recipe.data.sources[name], recipe.data, recipe.model, stage.objective, tokenizer, progress=progress)
        for name in stage.sources
    }
    return OpenStage(recipe, stage, tokenizer, indexes, recipe.run.seed + number)


def data_parallel_sizes(stage: StageConfig) -> list[int]:
    """Sizes that the stage's packs can be dealt out to."""
    groups = stage.packs_per_step // stage.micro_batch_packs
    return [n for n in range(1, groups + 1) if groups % n == 0]
