"""The same code on a GPU: run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.models.layers.attention import attend_packed
from megavlm.models.layers.packing import pack
from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TRAIN = """
import json, sys
from megavlm.config.load import load_recipe
from megavlm.testing.recipes import train_and_read
print("RESULT " + json.dumps([r["loss"] for r in train_and_read(load_recipe(sys.argv[1]))]))
"""


def losses(folder: Path, data_dir: Path, device: str, dtype: str) -> list[float]:
    """Train in a process of its own: a CPU process redirects CUDA names and cannot use the GPU any more."""
    from megavlm.config.load import dump_recipe

    run: dict[str, Any] = {"device": device, "deterministic": False}
    recipe = tiny_recipe(folder / "run", data_dir, [tiny_stage()], run=run, precision={"dtype": dtype})
    folder.mkdir(parents=True)
    dump_recipe(recipe, folder / "recipe.yaml")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(folder / "recipe.yaml")], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: list[float] = json.loads(line.removeprefix("RESULT "))
    return result


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_training_on_the_gpu_equals_the_cpu(dtype: str, tolerance: float, tmp_path: Path) -> None:
    data_dir = make_tiny_data(tmp_path / "data")
    on_cpu = losses(tmp_path / "cpu", data_dir, "cpu", "fp32")
    on_gpu = losses(tmp_path / "gpu", data_dir, "cuda", dtype)
    assert on_gpu == pytest.approx(on_cpu, rel=tolerance)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 4])
def test_varlen_attention_equals_fp64(causal: bool, groups: int) -> None:
    """torch's CUDA kernel over packed segments against one fp64 call a segment on the CPU; empty rows do not exist here."""
    generator = torch.Generator().manual_seed(0)
    lengths, heads, width = [1, 37, 128, 5, 200], 8, 64
    total = sum(lengths)
    q, k, v = (torch.randn(total, h, width, generator=generator) for h in (heads, heads // groups, heads // groups))
    truth = attend_packed(q.double(), k.double(), v.double(), pack(lengths, q.device, causal=causal), causal=causal, scale=0.125)
    packing = pack(lengths, torch.device("cuda"), causal=causal)
    out = attend_packed(*(x.cuda().bfloat16() for x in (q, k, v)), packing, causal=causal, scale=0.125)
    eager = attend_packed(*(x.bfloat16() for x in (q, k, v)), pack(lengths, q.device, causal=causal), causal=causal, scale=0.125)
    error = (out.double().cpu() - truth).abs().max()
    assert error <= 2 * (eager.double() - truth).abs().max() + 1e-3
