"""Recomputed and offloaded activations, and Adam in host memory, in every kind of layout: the numbers of one rank that keeps everything."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import TRAINING, assert_same_records, tiny_recipe, tiny_stage, train_and_read

OVERLAP = {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}
SAVINGS: dict[str, dict[str, Any]] = {
    "full": {"recompute": "full"},
    "MLP again + offload": {"recompute": "selective", "recompute_modules": ["mlp"], "offload_activations": 9},
    "full + offload, some layers": {"recompute": "full", "recompute_layers": 1, "offload_activations": 1},
    "Adam in host memory": {"offload_optimizer": True},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    # Parameters are gathered, and gradients reduced, by hooks of layers that run twice.
    "DP2+overlap": (2, OVERLAP),
    # Several microbatches wait for their backward pass at once.
    "PP2xVPP2 unequal": (2, {"pipeline": 2, "virtual_pipeline": 2, "layers_per_stage": [0, 1, 2, 1]}),
    "CP2 zigzag": (2, {"context": 2, "context_split": "zigzag"}),
    "TP2xCP2 dealt": (4, {"tensor": 2, "context": 2, "encoder_data_parallel": True}),
    "TP2+SPxPP2xDP2+overlap": (8, {"tensor": 2, "sequence": True, "pipeline": 2, **OVERLAP}),
}
# Layouts in which something else than the layers themselves takes part: hooks, several microbatches, gathered rows.
QUICK = {
    ("TP2+SP", "MLP again + offload", "all"),
    ("DP2+overlap", "full", "all"),
    ("PP2xVPP2 unequal", "MLP again + offload", "top_layers"),
}


def run(pool: RankPool, folder: Path, data: Path, world_size: int, training: str, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    recipe = tiny_recipe(folder, data, [tiny_stage(steps=2, **TRAINING[training])], parallel=parallel)
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return records


@pytest.fixture(scope="module")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("one")
    return {training: run(pool, base / training, data_dir, 1, training, {}) for training in ("all", "top_layers")}


@pytest.mark.parametrize(
    ("layout", "saving", "training"),
    slow_unless(product(LAYOUTS, SAVINGS, ("all", "top_layers")), lambda *case: case in QUICK),
)
def test_training_is_that_of_one_rank(
    layout: str, saving: str, training: str, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[str, list[dict[str, Any]]]
) -> None:
    """Some microbatches have no picture; packs differ in what they hold."""
    world_size, parallel = LAYOUTS[layout]
    assert_same_records(run(pool, tmp_path, data_dir, world_size, training, parallel | SAVINGS[saving]), one_rank[training])
