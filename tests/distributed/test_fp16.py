"""fp16 with a dynamic loss scale: overflowing steps are skipped, the scale follows, layouts and resumes agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import Recipe
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankError, RankPool
from megavlm.testing.recipes import ALL_TRAIN, PROJECTOR_ONLY, assert_same_records, tiny_recipe, tiny_stage, train_and_read

FP16 = {"dtype": "fp16", "loss_scale": {"initial": 256.0, "window_steps": 2}}
OVERFLOWING = {"dtype": "fp16", "loss_scale": {"initial": 2.0**20, "window_steps": 1000}}


def run(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int = 1, *, steps: int = 4, **blocks: Any) -> list[dict[str, Any]]:
    training = blocks.pop("training", ALL_TRAIN)
    recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=steps, **training)], **({"precision": FP16} | blocks))
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return records


@pytest.fixture(scope="module")
def one_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("fp16")
    return {
        "all": run(pool, base / "all", data_dir),
        "projector_only": run(pool, base / "projector", data_dir, training=PROJECTOR_ONLY),
        "fp32": run(pool, base / "fp32", data_dir, precision={"dtype": "fp32"}),
    }


def test_fp16_trains_as_fp32_does(one_rank: dict[str, list[dict[str, Any]]]) -> None:
    assert_same_records(one_rank["all"], one_rank["fp32"], 5e-3, 2e-2)
    for record, truth in zip(one_rank["all"], one_rank["fp32"], strict=True):
        assert record["skipped_steps"] == 0 and "loss_scale" not in truth
    # Doubled after every second update without overflow.
    assert [r["loss_scale"] for r in one_rank["all"]] == [256.0, 256.0, 512.0, 512.0]
    assert one_rank["all"][0]["loss"] != one_rank["fp32"][0]["loss"]


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    slow_unless(
        [(2, {"tensor": 2, "sequence": True}), (2, {"pipeline": 2}), (2, {"zero": 1}), (2, {"context": 2})],
        lambda world_size, parallel: "context" not in parallel,
    ),
)
def test_layouts_agree(
    world_size: int,
    parallel: dict[str, Any],
    pool: RankPool,
    data_dir: Path,
    tmp_path: Path,
    one_rank: dict[str, list[dict[str, Any]]],
) -> None:
    records = run(pool, tmp_path, data_dir, world_size, parallel=parallel)
    assert_same_records(records, one_rank["all"], 2e-3, 2e-2)
    for record, expected in zip(records, one_rank["all"], strict=True):
        assert record["loss_scale"] == expected["loss_scale"]


def test_a_last_stage_that_trains_nothing_scales_the_loss(
    pool: RankPool, data_dir: Path, tmp_path: Path, one_rank: dict[str, list[dict[str, Any]]]
) -> None:
    """It has no parameter in an optimizer, and yet the loss is its."""
    records = run(pool, tmp_path, data_dir, 2, parallel={"pipeline": 2}, training=PROJECTOR_ONLY)
    for record, expected in zip(records, one_rank["projector_only"], strict=True):
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=2e-2)
        assert record["loss_scale"] == expected["loss_scale"]


def watched(recipe: Recipe) -> tuple[list[dict[str, Any]], list[bool]]:
    """The run's records, and whether each step changed a weight."""
    from unittest.mock import patch

    from megavlm.training import loop

    changed: list[bool] = []
    inner = loop.train_step

    def train_step(model: Any, *args: Any) -> Any:
        before = [p.detach().clone() for m in model.modules for p in m.parameters()]
        masters = [p.detach().clone() for g in model.optimizer.param_groups for p in g["params"]]
        result = inner(model, *args)
        after = [p for m in model.modules for p in m.parameters()]
        same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        own = [p for g in model.optimizer.param_groups for p in g["params"]]
        changed.append(not (same and all(torch.equal(a, b) for a, b in zip(masters, own, strict=True))))
        return result

    with patch.object(loop, "train_step", train_step):
        return train_and_read(recipe), changed


@pytest.mark.parametrize(("world_size", "parallel"), slow_unless([(1, {}), (2, {"pipeline": 2}), (2, {"zero": 1})], lambda _, p: bool(p)))
def test_an_overflow_skips_the_step_and_halves_the_scale(
    world_size: int, parallel: dict[str, Any], pool: RankPool, data_dir: Path, tmp_path: Path
) -> None:
    """2^20 times the loss overflows fp16 until the scale has come down; weights and the learning rate wait for that."""
    recipe = tiny_recipe(tmp_path, data_dir, [tiny_stage(steps=18)], precision=OVERFLOWING, parallel=parallel)
    for records, changed in pool.run(watched, recipe, world_size=world_size)[:1]:
        skipped = [r for r in records if "grad_norm" not in r]
        assert 5 < len(skipped) < 16 and records[: len(skipped)] == skipped
        assert [r["loss_scale"] for r in skipped] == [2.0 ** (20 - i) for i in range(len(skipped))]
        assert changed == [False] * len(skipped) + [True] * (18 - len(skipped))
        assert records[-1]["skipped_steps"] == len(skipped)
        rates = [r["lr"]["language"] for r in records]
        assert len(set(rates[: len(skipped) + 1])) == 1 and rates[len(skipped) + 1] != rates[len(skipped)]
        # Nothing was learnt in the skipped steps, something was afterwards.
        assert records[-1]["loss"] < records[len(skipped)]["loss"]


@pytest.mark.parametrize("stop_after", [3, pytest.param(13, marks=pytest.mark.slow)])
def test_resume_is_bit_exact(stop_after: int, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """In the middle of overflows, and after them with a window half run down."""
    precision = {"dtype": "fp16", "loss_scale": {"initial": 2.0**17, "window_steps": 3, "hysteresis": 2}}
    whole = run(pool, tmp_path / "whole", data_dir, steps=16, precision=precision)
    assert sum("grad_norm" not in r for r in whole) > 3
    run(pool, tmp_path / "cut", data_dir, steps=16, precision=precision, run={"max_steps": stop_after})
    again = run(pool, tmp_path / "cut", data_dir, steps=16, precision=precision)
    keys = ("step", "loss", "grad_norm", "loss_scale", "skipped_steps", "lr")
    assert [[r.get(k) for k in keys] for r in again] == [[r.get(k) for k in keys] for r in whole]


def test_overflow_at_the_smallest_scale_ends_the_run(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    scale = {"initial": 2.0**40, "minimum": 2.0**39}
    with pytest.raises(RankError, match=r"step 2 .*overflow at precision\.loss_scale\.minimum=5\.49756e\+11.*bf16"):
        run(pool, tmp_path, data_dir, precision={"dtype": "fp16", "loss_scale": scale})
