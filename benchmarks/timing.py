"""Seconds of functions that take turns, for benchmarks of ops: a busy machine hurts all alike, and each one's best round counts."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Side = Callable[[], object]


def take_turns(sides: Mapping[str, Side], rounds: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each side in each round: CPU seconds of the process, or on CUDA those between two events. One round more warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            spent = _cuda_seconds(run) if device == "cuda" else _cpu_seconds(run)
            if number:
                seconds[name].append(spent)
    return seconds


def _cpu_seconds(run: Side) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def _cuda_seconds(run: Side) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def write_report(out: Path | None, device: str, results: Mapping[str, Any]) -> None:
    """Results with what they were measured on, as JSON; nothing where `out` is None."""
    from megavlm.tracking.environment import environment_report

    if out is None:
        return
    on = torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    report = {"command": " ".join(["python", *sys.argv]), "on": on, **results, "environment": environment_report()}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {out}\n")
