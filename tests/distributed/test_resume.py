"""A resumed run goes on as if it had never stopped, at any step and between stages.

Bit for bit on the same layout, within 1e-5 on another.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankError, RankPool
from megavlm.testing.recipes import (
    ENCODER_FROZEN,
    PARITY_OPTIMIZER,
    assert_same_records,
    encoder_stage,
    tiny_recipe,
    tiny_stage,
    train_and_read,
)

TOTAL_STEPS = 8


def stages() -> list[dict[str, Any]]:
    """Encoder, words, everything: each stage trains other modules, and two of them do not build the whole model."""
    words = {
        "name": "words",
        "objective": "text",
        "steps": 2,
        "packs_per_step": 4,
        "mixture": {"text": 1.0},
        "optimizer": PARITY_OPTIMIZER,
        "schedule": {"kind": "wsd", "warmup_steps": 1, "decay_steps": 1},
    }
    return [encoder_stage(), words, tiny_stage("frozen", steps=2, **ENCODER_FROZEN), tiny_stage("all", steps=2)]


def run(
    pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, parallel: dict[str, Any], max_steps: int | None, **blocks: Any
) -> Any:
    recipe = tiny_recipe(run_dir, data_dir, stages(), run={"max_steps": max_steps}, parallel=parallel, **blocks)
    return pool.run(train_and_read, recipe, world_size=world_size)[0]


def curve(records: list[dict[str, Any]]) -> list[tuple[int, str, float, float]]:
    return [(r["step"], r["stage"], r["loss"], r["grad_norm"]) for r in records]


@pytest.fixture(scope="session")
def uninterrupted(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = run(pool, tmp_path_factory.mktemp("whole"), data_dir, 1, {}, None)
    assert [r["stage"] for r in records] == ["encoder"] * 2 + ["words"] * 2 + ["frozen"] * 2 + ["all"] * 2
    return records


@pytest.mark.parametrize("stop_after", slow_unless(range(1, TOTAL_STEPS), lambda stop_after: stop_after in (1, 4, 7)))
def test_resume_is_bit_exact(stop_after: int, pool: RankPool, data_dir: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """Odd steps stop in the middle of a stage, even ones between two."""
    first = run(pool, tmp_path, data_dir, 1, {}, stop_after)
    assert len(first) == stop_after
    assert curve(run(pool, tmp_path, data_dir, 1, {}, None)) == curve(uninterrupted)


@pytest.mark.parametrize(
    ("world_size", "parallel", "blocks"),
    slow_unless(
        [
            (2, {"tensor": 2, "sequence": True}, {}),
            (2, {"pipeline": 2, "virtual_pipeline": 2}, {}),
            # Each stage trains other modules, and so splits the layers in its own way.
            (2, {"pipeline": 2, "split": "balanced"}, {}),
            (2, {"zero": 1}, {}),
            (2, {"zero": 1}, {"precision": {"dtype": "bf16"}}),
        ],
        # The others' layouts are resumed bit by bit in test_checkpoint_resume.
        lambda world_size, parallel, blocks: "split" in parallel or bool(blocks),
    ),
)
def test_resume_is_bit_exact_in_other_layouts(
    world_size: int, parallel: dict[str, Any], blocks: dict[str, Any], pool: RankPool, data_dir: Path, tmp_path: Path
) -> None:
    whole = run(pool, tmp_path / "whole", data_dir, world_size, parallel, None, **blocks)
    run_dir = tmp_path / "stopped"
    run(pool, run_dir, data_dir, world_size, parallel, 5, **blocks)
    assert curve(run(pool, run_dir, data_dir, world_size, parallel, None, **blocks)) == curve(whole)


def test_resume_through_changing_layouts(pool: RankPool, data_dir: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    """TP2 -> PP2 -> DP2 -> balanced PP2 -> virtual pipeline, each stopped in the middle of a stage; global batches stay the same."""
    run(pool, tmp_path, data_dir, 2, {"tensor": 2}, 1)
    run(pool, tmp_path, data_dir, 2, {"pipeline": 2}, 3)
    run(pool, tmp_path, data_dir, 2, {}, 5)
    run(pool, tmp_path, data_dir, 2, {"pipeline": 2, "split": "balanced"}, 7)
    records = run(pool, tmp_path, data_dir, 2, {"pipeline": 2, "virtual_pipeline": 2}, None)
    assert len(records) == TOTAL_STEPS
    assert_same_records(records, uninterrupted)
    for record, expected in zip(records, uninterrupted, strict=True):
        assert record["source_samples"] == expected["source_samples"]


def test_changed_model_is_refused(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    run(pool, tmp_path, data_dir, 1, {}, 3)
    before = (tmp_path / "recipe.yaml").read_text()
    with pytest.raises(RankError, match=r"model\.language\.ffn_hidden_size: 96 then, 80 now"):
        run(pool, tmp_path, data_dir, 1, {}, None, model={"language": {"ffn_hidden_size": 80}})
    assert (tmp_path / "recipe.yaml").read_text() == before


def test_changed_precision_is_refused(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    run(pool, tmp_path, data_dir, 1, {}, 1)
    with pytest.raises(RankError, match=r"trained in fp32, and the recipe says precision\.dtype=bf16"):
        run(pool, tmp_path, data_dir, 1, {}, None, precision={"dtype": "bf16"})


def test_changed_data_are_refused(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    run(pool, tmp_path, data_dir, 1, {}, 3)
    with pytest.raises(RankError, match=r"seq_len_tokens: 256 then, 512 now"):
        run(pool, tmp_path, data_dir, 1, {}, None, data={"seq_len_tokens": 512})


def test_existing_run_is_not_overwritten(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    run(pool, tmp_path, data_dir, 1, {}, 1)
    with pytest.raises(RankError, match=r"already holds checkpoints and checkpoint\.resume is false"):
        run(pool, tmp_path, data_dir, 1, {}, None, checkpoint={"resume": False})


def test_unfinished_newest_checkpoint_is_passed_over(
    pool: RankPool, data_dir: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]
) -> None:
    """A save that was killed leaves a folder that is no checkpoint; the one before it is used."""
    run(pool, tmp_path, data_dir, 1, {}, 5)
    newest = sorted((tmp_path / "checkpoints").glob("0*"))[-1]
    shutil.copytree(newest, newest.with_name("00000006-frozen.tmp"))
    assert curve(run(pool, tmp_path, data_dir, 1, {}, None)) == curve(uninterrupted)


def test_finished_run_does_nothing(pool: RankPool, data_dir: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]]) -> None:
    run(pool, tmp_path, data_dir, 1, {}, None)
    before = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert curve(run(pool, tmp_path, data_dir, 1, {}, None)) == curve(uninterrupted)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == before


def test_a_stage_put_before_those_that_have_begun_is_refused(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    run(pool, tmp_path, data_dir, 1, {}, 3)
    recipe = tiny_recipe(tmp_path, data_dir, [tiny_stage("warm", steps=1), *stages()])
    with pytest.raises(RankError, match="has begun the stages encoder, words, but the recipe begins with warm, encoder"):
        pool.run(train_and_read, recipe)
