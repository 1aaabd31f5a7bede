"""Held-out samples with the answers of the model that is being trained: what its loss says, to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.distributed as dist

from megavlm.config.schema import ParallelConfig, Recipe, StageConfig
from megavlm.data.prompt import Prompt
from megavlm.data.tokenizer import Tokenizer
from megavlm.evaluation.held_out import answer_right, prompts_of
from megavlm.evaluation.pictures import write_samples
from megavlm.evaluation.questions import EvaluationError, Question, load_questions
from megavlm.evaluation.results import Answer
from megavlm.evaluation.tracking import FOLDER, log_samples
from megavlm.inference.load import of_training
from megavlm.inference.loaded import LoadedModel
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.reductions import from_rank_zero
from megavlm.tracking.tracker import Tracker
from megavlm.training.build import StageModel

ANSWERS_FOLDER = "answers"
BATCH_SIZE = 4
"""Questions that are answered together: the training's own memory leaves little room."""
_Result = TypeVar("_Result")


class HeldOutAnswers:
    """Of one stage. Every rank makes one and calls `after`; the first data rank, with its tensor ranks, answers, and the others wait.

    What goes wrong with a sample or its files, and a lack of memory on a rank that answers alone, is a warning and the end of answers in
    this stage: they must not end a run.
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

    @property
    def are_wanted(self) -> bool:
        """Whether `after` has anything to do; alike on all ranks."""
        return self._wanted > 0

    def after(self, step: int) -> None:
        """Answer, behind the measurement that was made at `step`. Parameters must be whole on every rank.

        Raises torch.OutOfMemoryError on a tensor rank whose memory is full: the others wait for it in a layer, and the run ends.
        """
        if not self._wanted:
            return
        problem = self._answer(step) if self._ctx.data_rank == 0 else None
        # Other data ranks wait here, within the limit of an evaluation, and not in their next step; and all know alike what is to come.
        problem = from_rank_zero(problem)
        if problem is not None:
            self._wanted, self._questions = 0, None
            self._tracker.message(f"warning: held-out samples could not be answered at step {step}, and are not in this stage: {problem}")

    def _answer(self, step: int) -> str | None:
        """None, or what went wrong on one of the tensor ranks."""
        try:
            loaded, questions, prompts = self._together(self._prepare)
            answers = self._together(lambda: self._generate(loaded, questions, prompts))
            self._together(lambda: self._write(step, questions, answers))
        except EvaluationError as error:
            return f"{error}"
        return None

    def _prepare(self) -> tuple[LoadedModel, list[Question], list[Prompt]]:
        loaded = of_training(cast(VisionLanguageModel, self._model.modules[0]), self._recipe, self._tokenizer)
        questions = self._questions = self._questions or self._load()
        return loaded, questions, prompts_of(loaded, questions)

    def _generate(self, loaded: LoadedModel, questions: Sequence[Question], prompts: Sequence[Prompt]) -> list[Answer]:
        try:
            return answer_right(loaded, questions, prompts, BATCH_SIZE)
        except torch.OutOfMemoryError as error:
            if self._ctx.grid.tensor > 1:
                error.add_note(
                    f"while held-out samples were answered (evaluation.num_answers={self._wanted}): the other tensor ranks wait for this "
                    "one in a layer, so the run ends. Set evaluation.num_answers=0, or leave it more memory"
                )
                raise
            text = f"{error}"
        if self._ctx.device.type == "cuda":
            torch.cuda.empty_cache()  # only now: the exception held what was being computed
        raise EvaluationError(f"there is no memory for it beside training: {text}")

    def _write(self, step: int, questions: Sequence[Question], answers: Sequence[Answer]) -> None:
        if self._ctx.rank != 0:
            return
        folder = Path(self._recipe.run.dir) / ANSWERS_FOLDER / f"step-{step:08d}"
        if write_samples(questions, answers, folder, per_task=self._wanted) is not None:
            log_samples(self._tracker, folder, f"{FOLDER}/step-{step:08d}-training")

    def _load(self) -> list[Question]:
        recipe = self._recipe
        sources = {name: recipe.data.sources[name] for name in recipe.evaluation.sources}
        return load_questions(sources, recipe.data, recipe.model, self._tokenizer, tasks=None, per_task=self._wanted, seed=0)

    def _together(self, work: Callable[[], _Result]) -> _Result:
        """`work`, or EvaluationError on all tensor ranks: none may go on with what another cannot, which would wait for it for ever."""
        results: list[_Result] = []
        problem: str | None = None
        try:
            results.append(work())
        except (ValueError, OSError) as error:
            problem = str(error) or type(error).__name__
        problems = [problem]
        if self._ctx.grid.tensor > 1:
            problems *= self._ctx.grid.tensor
            dist.all_gather_object(problems, problem, group=self._ctx.tensor_group)
        for found in problems:
            if found is not None:
                raise EvaluationError(found)
        return results[0]


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
