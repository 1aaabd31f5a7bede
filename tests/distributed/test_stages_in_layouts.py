"""Encoder pretraining and text stages, then the whole model, in every kind of layout: the numbers of one rank.

Such stages build a part of the model only, and encoder pretraining has a grid of its own (training/layout.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import ALL_TRAIN, assert_same_records, encoder_stage, tiny_recipe, tiny_stage, train_and_read

OVERLAP = {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "DP2+overlap": (2, OVERLAP),
    "ZeRO-2": (2, {"zero": 2}),
    "ZeRO-3": (2, {"zero": 3}),
    "TP2+SP x ZeRO-3": (4, {"tensor": 2, "sequence": True, "zero": 3}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP2 x ZeRO-3": (4, {"pipeline": 2, "zero": 3}),
    "TP2xCP2 dealt": (4, {"tensor": 2, "context": 2, "encoder_data_parallel": True}),
    "again + offload": (1, {"recompute": "full", "offload_activations": 9}),
    "ZeRO-3, again + offload": (2, {"zero": 3, "recompute": "selective", "recompute_modules": ["mlp"], "offload_activations": 9}),
    "Adam in host memory": (2, {"zero": 1, "offload_optimizer": True}),
}
QUICK = {"ZeRO-3"}


def stages() -> list[dict[str, Any]]:
    text = {name: value for name, value in tiny_stage("text", steps=2, objective="text").items() if name not in ALL_TRAIN}
    return [encoder_stage(), text | {"mixture": {"text": 1.0}}, tiny_stage("all", steps=1)]


@pytest.fixture(scope="module")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = pool.run(train_and_read, tiny_recipe(tmp_path_factory.mktemp("one"), data_dir, stages()))[0]
    return records


@pytest.mark.parametrize("layout", slow_unless(LAYOUTS, lambda layout: layout in QUICK))
def test_every_kind_of_stage(layout: str, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: list[dict[str, Any]]) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = pool.run(train_and_read, tiny_recipe(tmp_path, data_dir, stages(), parallel=parallel), world_size=world_size)[0]
    assert [record["stage"] for record in records] == ["encoder", "encoder", "text", "text", "all"]
    assert_same_records(records, one_rank)
