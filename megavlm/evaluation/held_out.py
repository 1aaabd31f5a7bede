"""Measure a model on held-out questions with the right picture, with another sample's, and with none.

The right picture says how good the model is. The other two say whether it looks: with a swapped picture whose own answer
differs, a model that reads it is no longer right; without a picture only the prior of the answers is left.
"No picture" removes the picture and its placeholder from the prompt (no grey stand-in, which would still be a picture).

Prompts are made by the code that makes training samples; answers are greedy.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megavlm.config.schema import Recipe, SourceConfig
from megavlm.data.images import ImageError
from megavlm.data.prompt import Prompt
from megavlm.evaluation.pictures import write_picture_page, write_samples
from megavlm.evaluation.questions import EvaluationError, Question, chance, load_questions, swap_partners, without_pictures
from megavlm.evaluation.results import NONE, RIGHT, SWAPPED, Answer, EvaluationResult, Share, TaskResult
from megavlm.inference.loaded import LoadedModel
from megavlm.inference.prompts import make_prompt
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.reductions import from_rank_zero

EXTRA_TOKENS = 8
"""Room beyond the longest reference: an answer that needs more is wrong already."""


@dataclass(frozen=True)
class _Ask:
    """A question under a condition; `shown` is the question whose pictures are shown."""

    number: int
    condition: str
    shown: Question | None


def held_out_sources(recipe: Recipe, names: Sequence[str] | None = None, split: str = "heldout") -> dict[str, SourceConfig]:
    """Sources of a recipe with their split replaced: those named, else recipe.evaluation.sources.

    Two sources that differ only in their split become one. Raises EvaluationError for a name that the recipe does not have.
    """
    unknown = [n for n in names or () if n not in recipe.data.sources]
    if unknown:
        raise EvaluationError(
            f"the recipe has no data source {', '.join(unknown)}; it has {', '.join(sorted(recipe.data.sources)) or 'none'}"
        )
    chosen: dict[str, SourceConfig] = {}
    seen: list[SourceConfig] = []
    for name in names or recipe.evaluation.sources:
        source = recipe.data.sources[name].model_copy(update={"split": split})
        if source not in seen:
            seen.append(source)
            chosen[name] = source
    return chosen


def folder_sources(folders: Sequence[Path], split: str) -> dict[str, SourceConfig]:
    """Folders of shards as sources named by their path; for models that bring no recipe."""
    return {str(folder): SourceConfig(path=str(folder), split=split) for folder in folders}


def evaluate(
    loaded: LoadedModel,
    *,
    sources: Mapping[str, SourceConfig] | None = None,
    split: str = "heldout",
    tasks: Sequence[str] | None = None,
    samples_per_task: int = 200,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Ask held-out questions under the three conditions. All ranks call it together and get the whole result.

    Questions are divided over the data-parallel ranks of the model's grid. Rank 0 writes and shows the progress bar.

    Args:
        sources: what to measure on; None: evaluation.sources of the recipe, with `split`.
        tasks: None: every task there is.
        samples_per_task: at most; which ones follows from `seed`.
        max_new_tokens: None: the longest reference and EXTRA_TOKENS more.
        out: folder for evaluation.json, predictions.jsonl, pictures.png and samples/ with samples.json; None: nothing is written.

    Raises:
        EvaluationError: nothing to measure, a number below 1, a picture that cannot be read; also as `load_questions`.
        PromptError: a question with its answer is longer than the model has positions for.
    """
    for name, value in (("samples_per_task", samples_per_task), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
        if value is not None and value < 1:
            raise EvaluationError(f"{name}={value} must be at least 1")
    sources = held_out_sources(loaded.recipe, split=split) if sources is None else sources
    questions = _questions_everywhere(loaded, sources, tasks, samples_per_task, seed, progress)
    asks = _asks(questions, swap_partners(questions, seed))
    if max_new_tokens is None:
        max_new_tokens = longest_answer(loaded, questions)
    ctx = loaded.model.ctx
    mine = asks[ctx.data_rank :: ctx.grid.data]
    answers = _everyones(_answer_all(loaded, questions, mine, batch_size, max_new_tokens, progress), ctx)
    ordered = sorted(answers, key=lambda a: (a.number, a.condition))
    result = EvaluationResult(split, tuple(_task_results(questions, ordered)), tuple(ordered))
    if out is not None and ctx.rank == 0:
        result.write(out)
        write_picture_page(questions, result.answers, Path(out) / "pictures.png")
        write_samples(questions, result.answers, out)
    return result


def longest_answer(loaded: LoadedModel, questions: Sequence[Question]) -> int:
    """Tokens that an answer may have: of the longest reference, and EXTRA_TOKENS."""
    return max(len(loaded.tokenizer.encode(q.reference).ids) for q in questions) + EXTRA_TOKENS


def prompts_of(loaded: LoadedModel, questions: Sequence[Question]) -> list[Prompt]:
    """The questions with their own pictures. Raises EvaluationError for a picture that cannot be read."""
    return [_prompt(loaded, question, question) for question in questions]


def answer_right(loaded: LoadedModel, questions: Sequence[Question], prompts: Sequence[Prompt], batch_size: int) -> list[Answer]:
    """Answers to what `prompts_of` made of the questions, `batch_size` at a time, by this rank and its tensor ranks alone. Raises
    PromptError as `evaluate`."""
    asks = [_Ask(number, RIGHT, question) for number, question in enumerate(questions)]
    longest = longest_answer(loaded, questions)
    answers: list[Answer] = []
    for start in range(0, len(asks), batch_size):
        batch = slice(start, start + batch_size)
        answers += _answers(loaded, questions, asks[batch], prompts[batch], longest)
    return answers


def _questions_everywhere(
    loaded: LoadedModel, sources: Mapping[str, SourceConfig], tasks: Sequence[str] | None, per_task: int, seed: int, progress: bool
) -> list[Question]:
    """Rank 0 first: the others then find its index in the cache instead of scanning the shards once each."""

    def load(show: bool) -> list[Question]:
        recipe = loaded.recipe
        return load_questions(
            sources, recipe.data, recipe.model, loaded.tokenizer, tasks=tasks, per_task=per_task, seed=seed, progress=show
        )

    ctx = loaded.model.ctx
    if ctx.grid.world_size == 1:
        return load(progress)
    questions: list[Question] = []
    problem: Exception | None = None
    if ctx.rank == 0:
        try:
            questions = load(progress)
        except (ValueError, OSError) as error:
            problem = error
    problem = from_rank_zero(problem)
    if problem is not None:
        raise problem
    return questions if ctx.rank == 0 else load(False)


def _asks(questions: Sequence[Question], partners: Sequence[int | None]) -> list[_Ask]:
    """Every question under every condition that it has, conditions of one question together (so that ranks share them evenly)."""
    asks = []
    for number, (question, partner) in enumerate(zip(questions, partners, strict=True)):
        asks.append(_Ask(number, RIGHT, question))
        if partner is not None:
            asks.append(_Ask(number, SWAPPED, questions[partner]))
        if question.num_pictures:
            asks.append(_Ask(number, NONE, None))
    return asks


def _answer_all(
    loaded: LoadedModel, questions: Sequence[Question], asks: Sequence[_Ask], batch_size: int, max_new_tokens: int, progress: bool
) -> list[Answer] | Exception:
    """This rank's answers, or what went wrong: it is raised once all ranks know, so that none waits for one that has left."""
    answers: list[Answer] = []
    try:
        for batch in _batches(asks, batch_size, show=progress and loaded.model.ctx.rank == 0):
            answers += _answer(loaded, questions, batch, max_new_tokens)
    except (ValueError, OSError) as error:
        return error
    return answers


def _everyones(mine: list[Answer] | Exception, ctx: ParallelContext) -> list[Answer]:
    """Answers of all data-parallel ranks, on each. Raises what any of them raised."""
    outcomes: list[Any] = [mine]
    if ctx.grid.data > 1:
        outcomes = [None] * ctx.grid.data
        dist.all_gather_object(outcomes, mine, group=ctx.data_group)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return [answer for outcome in outcomes for answer in outcome]


def _batches(asks: Sequence[_Ask], size: int, show: bool) -> Iterable[list[_Ask]]:
    from tqdm import tqdm

    with tqdm(total=len(asks), desc="answering", unit="answer", disable=None if show else True) as bar:
        for start in range(0, len(asks), size):
            batch = list(asks[start : start + size])
            yield batch
            bar.update(len(batch))


def _answer(loaded: LoadedModel, questions: Sequence[Question], asks: Sequence[_Ask], max_new_tokens: int) -> list[Answer]:
    prompts = [_prompt(loaded, questions[ask.number], ask.shown) for ask in asks]
    return _answers(loaded, questions, asks, prompts, max_new_tokens)


def _answers(
    loaded: LoadedModel, questions: Sequence[Question], asks: Sequence[_Ask], prompts: Sequence[Prompt], max_new_tokens: int
) -> list[Answer]:
    generated = loaded.generate(prompts, max_new_tokens=max_new_tokens)
    answers = []
    for ask, ids in zip(asks, generated, strict=True):
        question, prediction = questions[ask.number], loaded.text(ids)
        swapped: dict[str, Any] = {}
        if ask.condition == SWAPPED and ask.shown is not None:
            asks_the_same = ask.shown.text == question.text
            swapped = {"partner": ask.shown.key, "follows": ask.shown.accepts(prediction) if asks_the_same else None}
        answers.append(
            Answer(
                number=ask.number,
                source=question.source,
                key=question.key,
                task=question.task,
                condition=ask.condition,
                question=question.text,
                reference=question.reference,
                prediction=prediction,
                right=question.accepts(prediction),
                ended=ids[-1] in loaded.chat.stop_ids,
                **swapped,
            )
        )
    return answers


def _prompt(loaded: LoadedModel, question: Question, shown: Question | None) -> Prompt:
    """The question with the pictures of `shown`, or without any."""
    messages = without_pictures(question.messages) if shown is None else question.messages
    pictures = [] if shown is None else shown.pictures()
    try:
        return make_prompt(messages, pictures, chat=loaded.chat, data=loaded.recipe.data, model=loaded.recipe.model)
    except ImageError as error:
        assert shown is not None
        raise EvaluationError(f"{shown.index.where(shown.row)}: its picture cannot be read: {error}") from error


def _task_results(questions: Sequence[Question], answers: Sequence[Answer]) -> list[TaskResult]:
    rows = []
    for task in sorted({q.task for q in questions}):
        ours = [q for q in questions if q.task == task]
        given = {c: [a for a in answers if a.task == task and a.condition == c] for c in (RIGHT, SWAPPED, NONE)}
        shares = {c: Share(sum(a.right for a in list_), len(list_)) for c, list_ in given.items()}
        follows = [a.follows for a in given[SWAPPED] if a.follows is not None]
        rows.append(
            TaskResult(
                task=task,
                metric=_metric(ours),
                samples=len(ours),
                right_picture=shares[RIGHT],
                swapped_picture=shares[SWAPPED],
                chance=chance(ours),
                follows_swapped=Share(sum(follows), len(follows)),
                no_picture=shares[NONE],
            )
        )
    return rows


def _metric(questions: Sequence[Question]) -> str:
    kinds = {q.box is not None for q in questions}
    if kinds == {True}:
        return "IoU >= 0.5"
    return "same text" if kinds == {False} else "same text, IoU >= 0.5"
