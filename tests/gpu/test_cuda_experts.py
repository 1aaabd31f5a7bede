"""Experts on a GPU, where megatron-core's exchange of tokens runs beside a CUDA stream: the losses are the CPU's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megavlm.testing.own_process import train_apart
from megavlm.testing.recipes import tiny_recipe, tiny_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "dense_layers": [1], "aux_loss": 0.01}


def losses(folder: Path, data_dir: Path, device: str) -> list[float]:
    run = {"device": device, "deterministic": False}
    recipe = tiny_recipe(folder / "run", data_dir, [tiny_stage(steps=3)], run=run, model={"language": {"moe": MOE}})
    return train_apart(recipe).losses


def test_experts_train_on_the_gpu_as_on_the_cpu(data_dir: Path, tmp_path: Path) -> None:
    on_cpu, on_gpu = (losses(tmp_path / device, data_dir, device) for device in ("cpu", "cuda"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
