"""precision.compile_encoder on a GPU: training is the same with and without."""

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


def train(folder: Path, data_dir: Path, precision: dict[str, Any]) -> list[dict[str, Any]]:
    recipe = tiny_recipe(folder / "run", data_dir, [tiny_stage()], run={"device": "cuda", "num_ranks": 1}, precision=precision)
    folder.mkdir(parents=True)
    dump_recipe(recipe, folder / "recipe.yaml")
    run_python("-m", "megavlm.cli", "train", str(folder / "recipe.yaml"))
    return read_metrics(folder / "run")


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_the_same_training(tmp_path: Path, data_dir: Path, dtype: str, tolerance: float) -> None:
    pytest.importorskip("triton")
    plain, compiled = (
        train(tmp_path / str(own), data_dir, {"dtype": dtype, "attention": "sdpa", "compile_encoder": own}) for own in (False, True)
    )
    assert len(plain) == len(compiled) > 0
    for got, want in zip(compiled, plain, strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=tolerance)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=3 * tolerance)
