"""A step's parts on a GPU: stamps are events in its stream, nobody waits for them, and the parts add up to the time that passed."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from megavlm.parallel.step_parts import CudaStamps
from megavlm.testing.own_process import train_apart
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.tracking.timers import StepClock, part, use_clock

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture
def clock() -> StepClock:
    return StepClock(CudaStamps())


def work(x: torch.Tensor, products: int) -> None:
    for _ in range(products):
        torch.mm(x, x)


@pytest.fixture
def matrix() -> torch.Tensor:
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    work(x, 3)
    torch.cuda.synchronize()
    return x


def step(clock: StepClock, x: torch.Tensor) -> None:
    """Five products for the encoder, the last of them inside the LLM's part, and 15 for the LLM: some 30 ms of an H200."""
    use_clock(clock)
    try:
        clock.begin_step()
        with part("encoder"):
            work(x, 4)
        with part("language"):
            work(x, 15)
            with part("encoder"):
                work(x, 1)
    finally:
        use_clock(None)


def test_parts_take_what_the_device_took(clock: StepClock, matrix: torch.Tensor) -> None:
    start = time.perf_counter()
    step(clock, matrix)
    torch.cuda.synchronize()
    wall = time.perf_counter() - start
    parts = clock.finish_step()
    assert sum(parts.values()) == pytest.approx(wall, rel=0.05, abs=1e-3)
    assert parts["language"] == pytest.approx(3 * parts["encoder"], rel=0.1)
    assert parts["data"] == parts["optimizer"] == 0


def test_what_the_device_has_not_done_counts_to_the_next_step(clock: StepClock, matrix: torch.Tensor) -> None:
    """The host is far ahead of some 20 products, so a step that ends at once has seen only part of them; none are lost."""
    start = time.perf_counter()
    step(clock, matrix)
    told = time.perf_counter() - start
    first = clock.finish_step()
    torch.cuda.synchronize()
    whole = time.perf_counter() - start
    clock.begin_step()
    second = clock.finish_step()
    assert told < whole / 2, "the stamps waited for the device"
    assert sum(first.values()) < whole / 2
    assert sum(first.values()) + sum(second.values()) == pytest.approx(whole, rel=0.1, abs=1e-3)


def test_parts_of_training_add_up_to_its_steps(data_dir: Path, tmp_path: Path) -> None:
    """Not step by step: the end of an update is in the next step's parts."""
    run = {"device": "cuda", "deterministic": False}
    records = train_apart(tiny_recipe(tmp_path / "run", data_dir, [tiny_stage(steps=12)], run=run, precision={"dtype": "bf16"})).records
    late = records[4:]
    parts = {name: sum(record["time_s"][name] for record in late) for name in late[0]["time_s"]}
    assert sum(parts.values()) == pytest.approx(sum(record["step_time_s"] for record in late), rel=0.1)
    assert all(parts[name] > 0 for name in ("encoder", "language", "head", "language_backward", "encoder_backward", "optimizer"))
