"""Training with z-loss: the same in every layout, apart from the loss in the report, inside the gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import assert_same_records, tiny_recipe, tiny_stage, train_and_read

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "DP2": (2, {}),
    "CP2": (2, {"context": 2}),
}


def run(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, z_loss: float, **blocks: Any) -> list[dict[str, Any]]:
    # Samples weigh unequally: weights reach the z-loss too.
    stage = tiny_stage(steps=3) | {"loss": {"z_loss": z_loss, "averaging": "sample"}}
    result: list[dict[str, Any]] = pool.run(train_and_read, tiny_recipe(run_dir, data_dir, [stage], **blocks), world_size=world_size)[0]
    return result


@pytest.fixture(scope="module")
def single_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, list[dict[str, Any]]]:
    return {z_loss: run(pool, tmp_path_factory.mktemp("single"), data_dir, 1, z_loss) for z_loss in (0.0, 0.05)}


def test_it_is_in_the_gradient_and_not_in_the_loss(single_rank: dict[float, list[dict[str, Any]]]) -> None:
    without, with_it = single_rank[0.0], single_rank[0.05]
    assert with_it[0]["loss"] == pytest.approx(without[0]["loss"], rel=1e-6) and with_it[0]["task_loss"] == without[0]["task_loss"]
    assert with_it[0]["grad_norm"] != pytest.approx(without[0]["grad_norm"], rel=1e-3)
    assert all(record["z_loss"] > 0 for record in with_it) and "z_loss" not in without[0]
    assert with_it[-1]["z_loss"] < with_it[0]["z_loss"], "training lowers it"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_equals_single_rank(
    layout: str, pool: RankPool, data_dir: Path, tmp_path: Path, single_rank: dict[float, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = run(pool, tmp_path, data_dir, world_size, 0.05, parallel=parallel)
    assert_same_records(records, single_rank[0.05])
    for record, expected in zip(records, single_rank[0.05], strict=True):
        assert record["z_loss"] == pytest.approx(expected["z_loss"], rel=1e-5)
