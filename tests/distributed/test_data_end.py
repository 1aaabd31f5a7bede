"""Data that end before the steps do end the stage: saved, told, and never trained on again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read


def run(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, parallel: dict[str, Any], **blocks: Any) -> list[dict[str, Any]]:
    once = tiny_stage("once", steps=99, mixture={"pages": {"weight": 1, "max_epochs": 0.3}})
    stages = [once, tiny_stage("then", steps=2, mixture={"text": 1})]
    recipe = tiny_recipe(
        run_dir, data_dir, stages, parallel=parallel, evaluation={"sources": ["held_out"], "every_steps": 50, "packs": 2}, **blocks
    )
    records: list[dict[str, Any]] = pool.run(messages_and_metrics, recipe, world_size=world_size)[0]
    return records


def messages_and_metrics(recipe: Any) -> list[dict[str, Any]]:
    """The run's metrics; what it told stands in run.dir/told.txt."""
    from unittest.mock import patch

    import torch.distributed as dist

    from megavlm.tracking.tracker import Tracker

    def tell(self: Any, text: str) -> None:
        if dist.get_rank() == 0:
            with (Path(recipe.run.dir) / "told.txt").open("a") as file:
                file.write(text + "\n")

    with patch.object(Tracker, "message", tell):
        return train_and_read(recipe)


def curve(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(r["step"], r["stage"], r["loss"], r["grad_norm"], r["source_samples"]) for r in records]


@pytest.fixture(scope="module")
def whole(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, run(pool, run_dir, data_dir, 1, {})


def test_the_stage_ends_with_its_data_and_the_next_begins(whole: tuple[Path, list[dict[str, Any]]], pool: RankPool, data_dir: Path) -> None:
    run_dir, records = whole
    ended = [r["step"] for r in records if r["stage"] == "once"][-1]
    assert 1 < ended < 99 and [r["stage"] for r in records] == ["once"] * ended + ["then"] * 2
    told = (run_dir / "told.txt").read_text()
    assert "before steps=99: the stage will end there" in told
    assert f"stage once ended after {ended} of 99 steps: every source reached max_epochs; " in told
    saved = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.is_dir())
    assert saved == [f"{ended:08d}-once", f"{ended + 2:08d}-then"]
    measured = (run_dir / "evaluation.jsonl").read_text().splitlines()
    assert len(measured) == 2, "each stage's end is measured, also on tasks that it does not train"
    # Once more: nothing is left to train.
    assert curve(run(pool, run_dir, data_dir, 1, {})) == curve(records)


def test_a_finished_stage_does_not_go_on_and_a_stopped_one_ends_at_the_same_step(
    whole: tuple[Path, list[dict[str, Any]]], pool: RankPool, data_dir: Path, tmp_path: Path
) -> None:
    records = whole[1]
    ended = [r["step"] for r in records if r["stage"] == "once"][-1]
    for stop_after in (1, ended):
        run_dir = tmp_path / str(stop_after)
        assert len(run(pool, run_dir, data_dir, 1, {}, run={"max_steps": stop_after})) == stop_after
        assert curve(run(pool, run_dir, data_dir, 1, {})) == curve(records)


@pytest.mark.parametrize(("world_size", "parallel"), [(2, {}), (2, {"pipeline": 2})])
def test_all_ranks_end_together(
    whole: tuple[Path, list[dict[str, Any]]], pool: RankPool, data_dir: Path, tmp_path: Path, world_size: int, parallel: dict[str, Any]
) -> None:
    records = run(pool, tmp_path, data_dir, world_size, parallel, data={"num_workers": 2})
    assert [r["source_samples"] for r in records] == [r["source_samples"] for r in whole[1]]
