"""The same code on a GPU: run with `pytest -m gpu` where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.models.layers.attention import attend_packed
from megavlm.models.layers.packing import pack
from megavlm.testing.own_process import OwnTraining, train_apart
from megavlm.testing.recipes import tiny_recipe, tiny_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def train(folder: Path, data_dir: Path, device: str, dtype: str) -> OwnTraining:
    run: dict[str, Any] = {"device": device, "deterministic": False}
    return train_apart(tiny_recipe(folder / "run", data_dir, [tiny_stage()], run=run, precision={"dtype": dtype}))


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> OwnTraining:
    return train(tmp_path_factory.mktemp("cpu"), data_dir, "cpu", "fp32")


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-3), ("bf16", 3e-2)])
def test_training_on_the_gpu_equals_the_cpu(dtype: str, tolerance: float, on_cpu: OwnTraining, data_dir: Path, tmp_path: Path) -> None:
    on_gpu = train(tmp_path, data_dir, "cuda", dtype)
    assert on_gpu.peak_bytes > on_cpu.peak_bytes == 0
    assert on_gpu.losses == pytest.approx(on_cpu.losses, rel=tolerance)


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
