"""Timers, peak rates, environment report, console lines."""

import io
import json
import logging
import os
import socket
import subprocess
import sys

import pytest
from rich.console import Console

from megavlm.tracking import console as console_module
from megavlm.tracking.console import TrainingDisplay, clock, get_logger, setup_logging, short_number, summary
from megavlm.tracking.environment import chosen_environment, environment_report
from megavlm.tracking.hardware import CPU_MATRIX_SIDE, UnknownDevice, peak_tflops


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "bf16", 756.5),
        ("NVIDIA H100 NVL", "fp8", 1671.0),
        ("NVIDIA H200", "bf16", 989.5),
        ("NVIDIA GH200 480GB", "bf16", 989.5),
        ("NVIDIA B200", "fp8", 4500.0),
        ("NVIDIA A100-SXM4-40GB", "bf16", 312.0),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA L40S", "bf16", 362.05),
        ("NVIDIA L4", "bf16", 121.0),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("NVIDIA RTX 6000 Ada Generation", "bf16", 364.2),
    ],
)
def test_peaks_of_known_gpus(name, dtype, expected):
    assert peak_tflops(name, dtype) == expected


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Tesla K80", "bf16"),
        ("NVIDIA A100-SXM4-40GB", "fp8"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"),
    ],
)
def test_an_unknown_peak_names_the_field_to_set(name, dtype):
    with pytest.raises(UnknownDevice, match=r"tracking\.peak_tflops_per_rank"):
        peak_tflops(name, dtype)


def test_the_cpu_rate_is_measured_once_and_is_the_rate_of_real_products(monkeypatch):
    import torch

    from megavlm.tracking import hardware

    hardware._measured_cpu_tflops.cache_clear()
    products, matmul = [], torch.matmul
    ticks = iter(range(10_000))
    monkeypatch.setattr(torch, "matmul", lambda a, b: products.append(a.shape) or matmul(a, b))
    # Every look at the clock is 10 ms later: a product takes 10 ms, and the measurement ends by itself.
    monkeypatch.setattr(hardware.time, "perf_counter", lambda: next(ticks) * 0.01)
    rate = peak_tflops(None, "fp32")
    monkeypatch.undo()
    assert rate == pytest.approx(2 * CPU_MATRIX_SIDE**3 / 0.01 / 1e12)
    assert 2 < len(products) < 20 and set(products) == {(CPU_MATRIX_SIDE, CPU_MATRIX_SIDE)}
    assert peak_tflops(None, "fp32") == rate
    hardware._measured_cpu_tflops.cache_clear()
    assert 1e-4 < peak_tflops(None, "fp32") < 100
    with pytest.raises(UnknownDevice, match=r"precision\.dtype"):
        peak_tflops(None, "fp8")


def test_the_environment_report_is_json_and_names_neither_machine_nor_secret(monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter2")
    monkeypatch.setenv("NCCL_SECRET", "hunter2")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    report = environment_report()
    text = json.dumps(report)
    assert "hunter2" not in text and os.environ.get("HOME", "/nowhere") not in text
    assert socket.gethostname() not in text or len(socket.gethostname()) < 5
    import torch

    assert report["packages"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert report["packages"]["apex"] is None or isinstance(report["packages"]["apex"], str)
    assert report["environment"]["NCCL_DEBUG"] == "INFO"
    assert report["cpu"]["cores"] >= 1


def test_only_listed_variables_are_taken():
    found = chosen_environment({"SLURM_JOB_ID": "7", "PATH": "x", "NCCL_IB_HCA": "mlx5", "NCCL_COMM_ID": "10.0.0.1:1", "NVTE_KEY": "s"})
    assert found == {"SLURM_JOB_ID": "7", "NCCL_IB_HCA": "mlx5"}


@pytest.fixture
def restore_logging():
    logger = logging.getLogger("megavlm")
    before = (list(logger.handlers), logger.level, logger.propagate, console_module._console)
    yield
    logger.handlers[:], logger.level, logger.propagate, console_module._console = before
    logger.manager._clear_cache()


def test_lines_where_there_is_no_terminal(restore_logging):
    stream = io.StringIO()
    display = TrainingDisplay(10, setup_logging(stream=stream), interactive=None)
    display.stage_begins("align", total_steps=25, first_step=3)
    for k in range(4, 26):
        display.step({"step": 100 + k, "stage_step": k, "loss": 2.0, "lr": {"a": 1e-3, "b": 1e-4}, "step_time_s": 2.0, "data_wait_s": 0.1})
    lines = stream.getvalue().splitlines()
    assert [line.split("INFO ")[1].split("  ")[0] for line in lines] == [
        "stage align: 25 steps, from step 3",
        "align 4/25",
        "align 10/25",
        "align 20/25",
        "align 25/25",
    ]
    assert lines[2].endswith("loss 2.0000  lr 1.00e-03  data wait 5.0%  eta 0:00:30")


def test_a_log_line_does_not_tear_the_bar(restore_logging):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    display = TrainingDisplay(10, console)
    setup_logging(stream=stream)
    logging.getLogger("megavlm").handlers[0]._console = console
    display.stage_begins("align", 5)
    display.step({"step": 1, "loss": 2.5})
    get_logger("megavlm.data").warning("sample [bold]7[/bold] is bad")
    display.close()
    text = stream.getvalue()
    assert "WARNING sample [bold]7[/bold] is bad\n" in text, "markup in a message must be left alone"
    assert "1/5" in text and "loss 2.5000" in text
    display.close()


def test_other_ranks_show_warnings_with_their_rank(restore_logging):
    stream = io.StringIO()
    setup_logging(rank=3, world_size=4, stream=stream)
    get_logger("megavlm.training").info("quiet")
    get_logger("elsewhere").warning("loud")
    (line,) = stream.getvalue().splitlines()
    assert "[rank 3] WARNING loud" in line


def test_numbers_for_people():
    assert [short_number(v) for v in (987, 12345, 4.5e6, 2e9)] == ["987", "12.3k", "4.50M", "2.00G"]
    assert clock(3723.4) == "1:02:03"
    assert summary({"loss": float("nan"), "lr": {}, "mfu": None}) == "loss nan"
    assert summary({"mfu": 0.42}) == "mfu 42.0%" and summary({"mfu": 1.2}, shows_mfu=False) == "mfu -"


def test_importing_the_package_loads_neither_torch_nor_mlflow():
    code = "import sys, megavlm.tracking.tracker, megavlm.tracking.hardware; print({'torch', 'mlflow', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
