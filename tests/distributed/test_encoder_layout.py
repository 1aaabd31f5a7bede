"""The encoder in another layout than the LLM: whole on every tensor rank, its pictures dealt to the ranks that share a microbatch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import ALL_TRAIN, ENCODER_FROZEN, PROJECTOR_ONLY, TOP_LAYERS, tiny_recipe, tiny_stage, train_and_read

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tensor": 2}),
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "CP2": (2, {"context": 2}),
    "TP2xCP2": (4, {"tensor": 2, "context": 2}),
    "TP2xDP2": (4, {"tensor": 2}),
    "PP2xTP2": (4, {"pipeline": 2, "tensor": 2}),
}
TRAINING = {"all": ALL_TRAIN, "encoder_frozen": ENCODER_FROZEN, "projector_only": PROJECTOR_ONLY, "top_layers": TOP_LAYERS}
WHOLE = {"encoder_tensor": 1}
DEALT = {"encoder_data_parallel": True}


def stage_of(training: str, **changes: Any) -> dict[str, Any]:
    return tiny_stage(steps=3, **(TRAINING[training] | changes))


def run(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, stage: dict[str, Any], **blocks: Any) -> list[dict[str, Any]]:
    recipe = tiny_recipe(run_dir, data_dir, [stage], **blocks)
    result: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return result


def assert_same(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    assert [r["step"] for r in records] == [r["step"] for r in reference]
    for record, expected in zip(records, reference, strict=True):
        where = f"step {expected['step']}"
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-5), where
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), where


@pytest.fixture(scope="session")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """The reference, for each way of freezing."""
    base = tmp_path_factory.mktemp("encoder-layout")
    return {name: run(pool, base / name, data_dir, 1, stage_of(name)) for name in TRAINING}


@pytest.mark.parametrize("training", TRAINING)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("encoder", ["whole", "dealt"])
def test_layout_equals_one_rank(
    encoder: str, layout: str, training: str, pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[str, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    own = WHOLE if encoder == "whole" else DEALT
    assert_same(run(pool, tmp_path, data_dir, world_size, stage_of(training), parallel=parallel | own), one_rank[training])
