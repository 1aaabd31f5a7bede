"""Experts on a GPU, where megatron-core's exchange of tokens runs beside a CUDA stream: the losses are the CPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megavlm.config.load import dump_recipe
from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TRAIN = """
import json, sys
from megavlm.config.load import load_recipe
from megavlm.testing.recipes import train_and_read
print("RESULT " + json.dumps([r["loss"] for r in train_and_read(load_recipe(sys.argv[1]))]))
"""
MOE = {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 64, "dense_layers": [1], "aux_loss": 0.01}


def losses(folder: Path, data_dir: Path, device: str) -> list[float]:
    """In a process of its own: a CPU process redirects CUDA names and cannot use the GPU any more."""
    folder.mkdir(parents=True)
    run = {"device": device, "deterministic": False}
    recipe = tiny_recipe(folder / "run", data_dir, [tiny_stage(steps=3)], run=run, model={"language": {"moe": MOE}})
    dump_recipe(recipe, folder / "recipe.yaml")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", TRAIN, str(folder / "recipe.yaml")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    found: list[float] = json.loads(line.removeprefix("RESULT "))
    return found


def test_experts_train_on_the_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    data_dir = make_tiny_data(tmp_path / "data")
    on_cpu, on_gpu = (losses(tmp_path / device, data_dir, device) for device in ("cpu", "cuda"))
    assert on_gpu == pytest.approx(on_cpu, rel=1e-3)
