"""Held-out samples with the answers of the model that is being trained: what its loss says, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch.distributed as dist

from megavlm.config.schema import ParallelConfig, Recipe, StageConfig
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.held_out import answer_right, prompts_of
from megavlm.evaluation.pictures import write_samples
from megavlm.evaluation.questions import Question, load_questions
from megavlm.evaluation.tracking import FOLDER, log_samples
from megavlm.inference.load import of_training
from megavlm.inference.loaded import LoadedModel
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import ParallelContext
from megavlm.tracking.tracker import Tracker
from megavlm.training.build import StageModel

ANSWERS_FOLDER = "answers"


class HeldOutAnswers:
    """Of one stage. Every rank makes one and calls `after`; the first data rank, with its tensor ranks, answers, and the others go on.

    What goes wrong with a sample is a warning and the end of answers in this stage: they must not end a run.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        layout: ParallelConfig,
        model: StageModel,
        tokenizer: Tokenizer,
        ctx: ParallelContext,
        tracker: Tracker,
    ) -> None:
        self._recipe, self._ctx, self._tracker = recipe, ctx, tracker
        self._wanted = recipe.evaluation.num_answers
        if self._wanted and (reason := cannot_answer(recipe, layout)):
            if stage.name == next(s.name for s in recipe.stages if s.objective == "multimodal"):  # once is enough
                tracker.message(
                    f"evaluation.num_answers={self._wanted}: no answers while training, because generation does not run with {reason}; "
                    "`megavlm evaluate` makes them from a checkpoint"
                )
            self._wanted = 0
        self._model, self._tokenizer = model, tokenizer
        self._questions: list[Question] | None = None

    def after(self, step: int) -> None:
        """Answer, behind the measurement that was made at `step`. Parameters must be whole on every rank."""
        if not self._wanted or self._ctx.data_rank != 0:
            return
        loaded = of_training(cast(VisionLanguageModel, self._model.modules[0]), self._recipe, self._tokenizer)
        try:
            self._answer(loaded, step)
        except (ValueError, OSError) as error:
            self._wanted = 0
            self._tracker.message(f"warning: held-out samples could not be answered at step {step}, and are not in this stage: {error}")

    def _answer(self, loaded: LoadedModel, step: int) -> None:
        # What one tensor rank alone cannot read, none of them may go on with: the others would wait for it in the first layer.
        problem: Exception | None = None
        try:
            questions = self._questions = self._questions or self._load()
            prompts = prompts_of(loaded, questions)
        except (ValueError, OSError) as error:
            problem = error
        self._raise_together(problem)
        answers = answer_right(loaded, questions, prompts)
        if self._ctx.rank != 0:
            return
        folder = Path(self._recipe.run.dir) / ANSWERS_FOLDER / f"step-{step:08d}"
        if write_samples(questions, answers, folder, per_task=self._wanted) is not None:
            log_samples(self._tracker, folder, f"{FOLDER}/step-{step:08d}-training")

    def _load(self) -> list[Question]:
        recipe = self._recipe
        sources = {name: recipe.data.sources[name] for name in recipe.evaluation.sources}
        return load_questions(sources, recipe.data, recipe.model, self._tokenizer, tasks=None, per_task=self._wanted, seed=0)

    def _raise_together(self, problem: Exception | None) -> None:
        texts: list[str | None] = [None if problem is None else f"{problem}"]
        if self._ctx.grid.tensor > 1:
            texts *= self._ctx.grid.tensor
            dist.all_gather_object(texts, texts[0], group=self._ctx.tensor_group)
        if found := next((text for text in texts if text is not None), None):
            raise ValueError(found) from problem


def cannot_answer(recipe: Recipe, layout: ParallelConfig) -> str | None:
    """What of the layout or precision generation does not run with, as the recipe names it; None: it runs."""
    limits = {
        "pipeline": layout.pipeline > 1,
        "context": layout.context > 1,
        "sequence": layout.sequence,
        "expert": layout.expert > 1,
        "zero": layout.zero > 1,  # parameters are whole inside of a forward pass only
    }
    found = [f"parallel.{name}={str(getattr(layout, name)).lower()}" for name, is_there in limits.items() if is_there]
    if recipe.precision.fp8 != "none":
        found.append(f"precision.fp8={recipe.precision.fp8}")
    return ", ".join(found) or None
