"""Pipelines: interleaved chunks of unequal depth with everything else, held-out losses, and the balanced split of each stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import ALL_TRAIN, assert_same_records, tiny_recipe, tiny_stage, train_and_read

INTERLEAVED = {"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [0, 1, 2, 1]}
STAGE = tiny_stage(steps=3)

FEATURES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "nothing more": (2, {}, {}),
    "TP2+SP": (4, {"tensor": 2, "sequence": True}, {}),
    "CP2": (4, {"context": 2}, {}),
    "recompute": (2, {"recompute": "full"}, {}),
    "zero 1": (4, {"zero": 1}, {}),
    "pictures dealt out": (4, {"tensor": 2, "encoder_data_parallel": True}, {}),
    "two packs a microbatch": (2, {}, {"micro_batch_packs": 2}),
}


def run(pool: RankPool, folder: Path, data_dir: Path, world_size: int, stage: dict[str, Any], **blocks: Any) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = pool.run(train_and_read, tiny_recipe(folder, data_dir, [stage], **blocks), world_size=world_size)[0]
    return records


@pytest.fixture(scope="module")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(pool, tmp_path_factory.mktemp("one"), data_dir, 1, STAGE)


@pytest.mark.parametrize("feature", FEATURES)
def test_interleaved_unequal_chunks_go_with(
    feature: str, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: list[dict[str, Any]]
) -> None:
    world_size, parallel, changes = FEATURES[feature]
    records = run(pool, tmp_path, data_dir, world_size, STAGE | changes, parallel=INTERLEAVED | parallel)
    assert len(records) == len(one_rank) == 3
    assert_same_records(records, one_rank)


def test_held_out_losses(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Forward passes alone, through chunks of every kind."""
    evaluation = {"sources": ["held_out"], "every_steps": 1, "packs": 4}
    layouts = [(1, {}), (2, INTERLEAVED), (3, {"pipeline": 3, "layers_per_stage": [0, 4, 0]})]
    found = []
    for number, (world_size, parallel) in enumerate(layouts):
        folder = tmp_path / str(number)
        run(pool, folder, data_dir, world_size, tiny_stage(steps=1), parallel=parallel, evaluation=evaluation)
        found.append([json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()])
    for records in found[1:]:
        assert [r["targets"] for r in records] == [r["targets"] for r in found[0]]
        assert [r["loss"] for r in records] == pytest.approx([r["loss"] for r in found[0]], rel=1e-5)


def layers_of_stages(recipe: Recipe) -> list[list[int] | None]:
    """The layers of each chunk for which this rank built the model, stage by stage."""
    from megavlm.training.build import build_chunks as build

    seen: list[list[int] | None] = []

    def build_chunks(recipe: Recipe, stage: Any, parallel: ParallelConfig, ctx: Any) -> Any:
        seen.append(parallel.layers_per_stage)
        return build(recipe, stage, parallel, ctx)

    with patch("megavlm.training.checkpointing.build_chunks", build_chunks):
        train_and_read(recipe)
    return seen


def test_each_stage_is_balanced_for_itself_and_alike_on_every_rank(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """A heavy encoder: alone on the first stage where it trains, with layers where it is frozen, absent from a text stage."""
    heavy = {"vision": {"hidden_size": 64, "ffn_hidden_size": 128, "num_layers": 5}}
    mixture = {"mixture": {"pages": 1.0}}
    frozen = {"vision": {"train": "frozen"}, "projector": {"train": "full"}, "language": {"train": "full"}}
    text = {key: value for key, value in tiny_stage("text", steps=1, objective="text").items() if key not in ALL_TRAIN} | {
        "mixture": {"text": 1.0}
    }
    stages = [text, tiny_stage("all", steps=1) | mixture, tiny_stage("frozen", steps=2, **frozen) | mixture]

    def start(max_steps: int | None) -> list[list[list[int] | None]]:
        parallel = {"pipeline": 2, "split": "balanced"}
        recipe = tiny_recipe(tmp_path / "run", data_dir, stages, parallel=parallel, model=heavy, run={"max_steps": max_steps})
        return pool.run(layers_of_stages, recipe, world_size=2)

    first, resumed = start(3), start(None)
    assert first[0] == first[1] and resumed[0] == resumed[1]
    in_text, in_all, in_frozen = first[0]
    assert in_text == [2, 2] and in_all == [0, 4] and in_frozen is not None and in_frozen[0] > 0
    assert resumed[0] == [in_frozen], "the stage goes on with the split that it began with"
