"""LLaVA-OneVision's pictures in training: features shrunk where there are many, one padded tile for each of several pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import assert_same_records, tiny_recipe, tiny_stage, train_and_read

MODEL = {"vision": {"image_size_px": 24}, "projector": {"image_newline": True}}
SHRUNK = {"policy": "anyres", "anyres_several": "whole", "anyres_max_tiles": 1}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2+overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "CP2": (2, {"context": 2}),
}


def records(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, image: dict[str, Any], **blocks: Any) -> list[dict[str, Any]]:
    stage = tiny_stage(steps=2)
    recipe = tiny_recipe(run_dir, data_dir, [stage], model=MODEL, data={"image": image}, **blocks)
    result: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return result


@pytest.fixture(scope="module")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return records(pool, tmp_path_factory.mktemp("one"), data_dir, 1, SHRUNK)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_is_the_same_in_every_layout(
    layout: str, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: list[dict[str, Any]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    found = records(pool, tmp_path, data_dir, world_size, SHRUNK, parallel=parallel)
    assert_same_records(found, one_rank)
    for record, expected in zip(found, one_rank, strict=True):
        assert (record["tiles"], record["images"]) == (expected["tiles"], expected["images"])


def test_shrinking_changes_the_batches(pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: list[dict[str, Any]]) -> None:
    """Guards the test above: without shrinking and with a grid for each picture there are other tokens."""
    plain = records(pool, tmp_path, data_dir, 1, {"policy": "anyres"})
    assert plain[0]["useful_tokens"] != one_rank[0]["useful_tokens"] or plain[0]["tiles"] != one_rank[0]["tiles"]
    assert all(record["loss"] > 0 for record in one_rank)
