"""Held-out samples that a model answers while it trains: those of `megavlm evaluate`, and nothing of the training changes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from PIL import Image
from pydantic import ValidationError

from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.evaluation.held_out import evaluate
from megavlm.evaluation.results import RIGHT
from megavlm.inference.load import load_for_inference, of_training
from megavlm.inference.loaded import LoadedModel
from megavlm.testing.pool import RankError, RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.tracker import Tracker
from megavlm.training import answers as answering
from megavlm.training.answers import BATCH_SIZE, cannot_answer
from megavlm.training.sections import Sections

EVALUATION = {"sources": ["held_out"], "every_steps": 2, "packs": 2}
OVERLAPPED = {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True, "recompute": "full"}
SAMPLES = 2


def recipe_of(run_dir: Path, data_dir: Path, answers: int = SAMPLES, **blocks: Any) -> Recipe:
    return tiny_recipe(run_dir, data_dir, [tiny_stage(steps=4)], evaluation={**EVALUATION, "num_answers": answers}, **blocks)


def train(recipe: Recipe) -> tuple[list[dict[str, Any]], list[str]]:
    """Records, and what the run said."""
    said: list[str] = []
    with patch.object(Tracker, "message", lambda self, text: said.append(text)):
        return train_and_read(recipe), said


def answers_of_checkpoint(path: Path) -> list[tuple[str, str, str]]:
    """As `megavlm evaluate` gives them."""
    result = evaluate(load_for_inference(path, device="cpu"), samples_per_task=SAMPLES, progress=False)
    return sorted((a.question, a.reference, a.prediction) for a in result.answers if a.condition == RIGHT)


def kept(run_dir: Path, step: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((run_dir / "answers" / f"step-{step:08d}" / "samples.json").read_text())
    return rows


def check(rows: list[dict[str, Any]], folder: Path, truth: list[tuple[str, str, str]]) -> None:
    """Rows of samples.json in `folder`, with their pictures and their table for MLflow, are what the checkpoint answers."""
    assert sorted((r["question"], r["reference"], r["prediction"]) for r in rows) == truth and len(rows) >= SAMPLES
    for row in rows:
        assert Image.open(folder / "samples" / row["picture"]).size == (48, 48)
    table = json.loads((folder / "mlflow-samples.json").read_text())
    assert table["columns"][0] == "picture" and len(table["data"]) == len(rows)


def test_answers_are_those_of_the_checkpoint(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    pool.run(train, recipe_of(tmp_path, data_dir), world_size=1)
    (truth,) = pool.run(answers_of_checkpoint, tmp_path)
    check(kept(tmp_path, 4), tmp_path / "answers" / "step-00000004", truth)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "parallel"), [(1, {}), (2, {"tensor": 2}), (2, OVERLAPPED), (4, {"tensor": 2, "encoder_data_parallel": True})]
)
def test_answers_change_nothing_in_any_layout(
    world_size: int, parallel: dict[str, Any], pool: RankPool, data_dir: Path, tmp_path: Path
) -> None:
    run, checkpoint = tmp_path / "run", {"every_steps": 2, "keep_last": 5}
    records, said = pool.run(train, recipe_of(run, data_dir, parallel=parallel, checkpoint=checkpoint), world_size=world_size)[0]
    plain, _ = pool.run(train, recipe_of(tmp_path / "plain", data_dir, 0, parallel=parallel), world_size=world_size)[0]
    assert [(r["loss"], r["grad_norm"]) for r in records] == [(r["loss"], r["grad_norm"]) for r in plain]
    assert not (tmp_path / "plain" / "answers").exists() and not any("answer" in line for line in said), said
    for step in (2, 4):
        (truth,) = pool.run(answers_of_checkpoint, run / "checkpoints" / f"{step:08d}-all")
        check(kept(run, step), run / "answers" / f"step-{step:08d}", truth)
    assert kept(run, 2) != kept(run, 4), "the model learns"


def test_where_generation_does_not_run_a_line_says_so_and_training_goes_on(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    records, said = pool.run(train, recipe_of(tmp_path, data_dir, parallel={"pipeline": 2}), world_size=2)[0]
    assert len(records) == 4 and not (tmp_path / "answers").exists()
    (line,) = [text for text in said if "num_answers" in text]
    assert "evaluation.num_answers=2: no answers" in line and "parallel.pipeline=2" in line and "megavlm evaluate" in line


def test_what_cannot_answer_is_named(data_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, data_dir)
    for field, value in (("context", 2), ("expert", 2), ("zero", 3)):
        assert cannot_answer(recipe, ParallelConfig.model_validate({field: value})) == f"parallel.{field}={value}"
    assert cannot_answer(recipe, ParallelConfig(tensor=2, sequence=True)) == "parallel.sequence=true"
    assert cannot_answer(recipe, ParallelConfig(tensor=2, zero=1)) is None
    with pytest.raises(ValidationError, match="num_answers=2 comes behind measurements"):
        tiny_recipe(tmp_path, data_dir, evaluation={"num_answers": 2})


FAILING = {**EVALUATION, "every_steps": 1, "num_answers": SAMPLES}
"""A measurement behind the first step, in which something fails, and one behind the next, at which all ranks must still be together."""


def train_where_one_rank_cannot_read(recipe: Recipe) -> tuple[list[dict[str, Any]], list[str]]:
    """The last rank does not get at the files that the model began with."""

    def read(*what: Any) -> LoadedModel:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise OSError("Stale file handle")
        return of_training(*what)

    with patch.object(answering, "of_training", read):
        return train(recipe)


@pytest.mark.parametrize("fails", ["write", "read"])
def test_what_one_rank_cannot_read_or_write_ends_answers_on_all(fails: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    if fails == "write":
        (tmp_path / "answers").write_text("a file, in which no folder can be made\n")
    recipe = tiny_recipe(tmp_path, data_dir, [tiny_stage(steps=2)], evaluation=FAILING, parallel={"tensor": 2})
    # Ranks in different collectives would wait until this limit.
    told = pool.run(train if fails == "write" else train_where_one_rank_cannot_read, recipe, world_size=2, timeout_s=60.0)
    assert [len(records) for records, _ in told] == [2, 2]
    for _, said in told:
        (line,) = [text for text in said if "could not be answered" in text]
        assert "at step 1," in line and ("Not a directory" if fails == "write" else "Stale file handle") in line


def train_without_memory(recipe: Recipe) -> tuple[list[dict[str, Any]], list[str]]:
    """Generation finds none."""

    def generate(self: LoadedModel, *what: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with patch.object(LoadedModel, "generate", generate):
        return train(recipe)


def test_without_memory_a_rank_alone_trains_on_and_tensor_ranks_say_what_to_do(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "alone", data_dir, [tiny_stage(steps=2)], evaluation=FAILING)
    for records, said in pool.run(train_without_memory, recipe, world_size=2, timeout_s=60.0):
        (line,) = [text for text in said if "could not be answered" in text]
        assert len(records) == 2 and "no memory" in line and "Tried to allocate 2.00 GiB" in line
    divided = tiny_recipe(tmp_path / "divided", data_dir, [tiny_stage(steps=2)], evaluation=FAILING, parallel={"tensor": 2})
    with pytest.raises(
        RankError, match=r"(?s)OutOfMemoryError: .*Tried to allocate.*\(evaluation\.num_answers=2\).*evaluation\.num_answers=0"
    ):
        pool.run(train_without_memory, divided, world_size=2, timeout_s=60.0)


def train_and_time(recipe: Recipe) -> tuple[list[float], list[float]]:
    """By the machine's clock: when this rank left each evaluation, and when it had made answers."""
    left: list[float] = []
    answered: list[float] = []
    evaluation, generate = Sections.evaluation, LoadedModel.generate

    @contextmanager
    def timed(self: Sections) -> Iterator[None]:
        with evaluation(self):
            yield
            left.append(time.monotonic())

    def generate_and_note(self: LoadedModel, *what: Any, **named: Any) -> Any:
        found = generate(self, *what, **named)
        answered.append(time.monotonic())
        return found

    with patch.object(Sections, "evaluation", timed), patch.object(LoadedModel, "generate", generate_and_note):
        train(recipe)
    return left, answered


def test_other_data_ranks_wait_under_the_limit_of_an_evaluation(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path, data_dir, [tiny_stage(steps=1)], evaluation=FAILING)
    (_, answered), (left, others) = pool.run(train_and_time, recipe, world_size=2)
    assert answered and not others and len(left) == 2, "the loss, and the answers"
    assert left[1] >= max(answered)


def train_and_count(recipe: Recipe) -> list[int]:
    """Prompts that were generated from together."""
    sizes: list[int] = []
    generate = LoadedModel.generate

    def generate_and_count(self: LoadedModel, prompts: Any, **named: Any) -> Any:
        sizes.append(len(prompts))
        return generate(self, prompts, **named)

    with patch.object(LoadedModel, "generate", generate_and_count):
        train(recipe)
    return sizes


def test_batches_are_small(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """What is generated together does not grow with what is asked for."""
    many = {**FAILING, "num_answers": BATCH_SIZE + 1}
    (sizes,) = pool.run(train_and_count, tiny_recipe(tmp_path, data_dir, [tiny_stage(steps=1)], evaluation=many))
    assert max(sizes) == BATCH_SIZE and sum(sizes) == len(kept(tmp_path, 1)) > BATCH_SIZE
