"""Faults on a GPU: hashes equal the CPU's, a bad step is skipped without a trace, and a device that hangs does not keep the process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.exits import Exit
from megavlm.config.load import dump_recipe
from megavlm.parallel.hashes import content_hash
from megavlm.testing.own_process import run_python
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.tracking.metrics import read_metrics

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
TRAIN = """
import sys
from megavlm.config.load import load_recipe
from megavlm.testing.faults import bad_steps, without_data_of
from megavlm.testing.recipes import train_and_read
with (bad_steps({2: float("nan")}) if sys.argv[2] == "bad" else without_data_of({2})):
    train_and_read(load_recipe(sys.argv[1]))
"""
HANG = """
import sys, torch
from pathlib import Path
from megavlm.parallel.watchdog import Watchdog
torch.zeros(1, device="cuda")
def waiting_for_the_device():
    torch.cuda._sleep(1 << 40)
    torch.cuda.synchronize()
with Watchdog(Path(sys.argv[1]), 0, 1) as dog:
    dog.enter("a step", 2.0, "step_s")
    waiting_for_the_device()
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float64])
def test_a_hash_is_the_same_on_any_device(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tensor = torch.randn(5_000_011).mul(50).to(dtype)
    assert content_hash(tensor.cuda()).item() == content_hash(tensor).item()


@pytest.mark.parametrize(
    ("dtype", "parallel"), [("bf16", {"zero": 1}), ("bf16", {"zero": 3}), ("fp16", {}), ("bf16", {"offload_optimizer": True})]
)
def test_a_skipped_step_leaves_no_trace(dtype: str, parallel: dict[str, Any], tmp_path: Path, data_dir: Path) -> None:
    records = []
    for what in ("bad", "without"):
        recipe = tiny_recipe(
            tmp_path / what, data_dir, [tiny_stage(steps=5)], run={"device": "cuda"}, precision={"dtype": dtype}, parallel=parallel,
            faults={"on_nonfinite": "skip", "replica_hash_every_steps": 2},
        )  # fmt: skip
        dump_recipe(recipe, tmp_path / f"{what}.yaml")
        run_python("-c", TRAIN, str(tmp_path / f"{what}.yaml"), what)
        records.append(read_metrics(tmp_path / what))
    bad, truth = records
    assert bad[2]["skipped"] == "nonfinite"
    assert [r["loss"] for r in bad[:2] + bad[3:]] == pytest.approx([r["loss"] for r in truth[:-1]], rel=1e-4)
    assert json.loads((tmp_path / "bad" / "incidents.jsonl").read_text())["action"] == "skip"


def test_a_device_that_hangs(tmp_path: Path) -> None:
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", HANG, str(tmp_path)], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == Exit.HUNG, done.stderr
    assert "waiting_for_the_device" in (tmp_path / "rank-0.txt").read_text()
    assert time.monotonic() - start < 60
