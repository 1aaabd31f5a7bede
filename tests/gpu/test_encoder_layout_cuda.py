"""Dealt pictures on GPUs: what is gathered over NCCL, and, with two GPUs, training against one, Transformer Engine's layers included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.load import dump_recipe
from megavlm.testing.own_process import run_python
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.tracking.metrics import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

GATHER = """
import torch
from megavlm.config.schema import ParallelConfig
from megavlm.parallel.context import enter_grid, start_process_group, stop_process_group
from megavlm.parallel.encoder_layout import RowLayout, gather_rows
device = torch.device("cuda", 0)
start_process_group(device, 60.0)
ctx = enter_grid(ParallelConfig(), device, seed=1)
layout = RowLayout.of([0, 3, 3, 8], [[0, 1, 2]], ctx)
for dtype in (torch.float32, torch.bfloat16):
    rows = torch.randn(8, 16, device=device, dtype=dtype, requires_grad=True)
    upstream = torch.randn_like(rows)
    out = gather_rows(rows, layout)
    out.backward(upstream)
    assert torch.equal(out, rows) and torch.equal(rows.grad, upstream), dtype
stop_process_group()
print("RESULT same")
"""


def test_rows_over_nccl() -> None:
    assert "RESULT same" in run_python("-c", GATHER)


def train(folder: Path, data_dir: Path, ranks: int, dtype: str, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    run = {"device": "cuda", "num_ranks": ranks}
    recipe = tiny_recipe(folder / "run", data_dir, [tiny_stage()], run=run, precision={"dtype": dtype}, parallel=parallel)
    folder.mkdir(parents=True)
    dump_recipe(recipe, folder / "recipe.yaml")
    run_python("-m", "megavlm.cli", "train", str(folder / "recipe.yaml"))
    return read_metrics(folder / "run")


LAYOUTS: dict[str, dict[str, Any]] = {
    "whole": {"tensor": 2, "encoder_tensor": 1},
    "dealt over tensor ranks": {"tensor": 2, "sequence": True, "encoder_data_parallel": True},
    "dealt over context ranks": {"context": 2, "encoder_data_parallel": True},
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_gpus_equal_one(layout: str, dtype: str, tolerance: float, data_dir: Path, tmp_path: Path) -> None:
    one = train(tmp_path / "one", data_dir, 1, dtype, {})
    two = train(tmp_path / "two", data_dir, 2, dtype, LAYOUTS[layout])
    for record, expected in zip(two, one, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=tolerance)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=10 * tolerance)
