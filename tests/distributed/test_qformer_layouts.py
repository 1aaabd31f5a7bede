"""A Q-Former trains alike in every layout, with microbatches that have no picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read

QFORMER = {"num_queries": 5, "num_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 40}
MODEL = {
    "vision": {"feature_layer": -1, "final_norm": True, "keep_class_token": True},
    "projector": {"kind": "qformer", "num_layers": 1, "qformer": QFORMER},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2+overlap": (2, {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}),
}


def train(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, **blocks: Any) -> list[dict[str, Any]]:
    recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=3)], model=MODEL, **blocks)
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return records


@pytest.fixture(scope="session")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(pool, tmp_path_factory.mktemp("qformer"), data_dir, 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: list[dict[str, Any]]) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = train(pool, tmp_path, data_dir, world_size, parallel=parallel)
    for record, expected in zip(records, one_rank, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
        assert record["tiles"] == expected["tiles"]
    assert one_rank[-1]["loss"] < one_rank[0]["loss"]
