"""What is there, whether it is right, and what the device can do at most: doctor, tests marked `gpu`, ceilings."""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu.runner import ROOT, Place, Task, Unavailable

TEST_PROCESSES = 6
TEST_RESERVE_S = 30.0
"""Of the section's limit, for the last test to end and for the results."""
MOST_MESSAGES = 20


def tasks(section: str, place: Place) -> dict[str, Task]:
    if section == "environment":
        return {"doctor": doctor, "versions": versions}
    if section == "tests":
        return {"pytest": lambda: gpu_tests(place)}
    names: dict[str, Callable[[bool, str], dict[str, Any]]] = {
        "matmul bf16": matmul_bf16,
        "matmul fp8 tensorwise": matmul_fp8_tensorwise,
        "matmul fp8 rowwise": matmul_fp8_rowwise,
        "copy": copy,
    }
    return {name: lambda f=function: f(place.tiny, place.device) for name, function in names.items()}  # type: ignore[misc]


# --------------------------------------------------------------------------------------------------------- environment


def doctor() -> dict[str, Any]:
    """`megavlm doctor --json`."""
    done = subprocess.run([sys.executable, "-m", "megavlm.cli", "doctor", "--json"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"megavlm doctor ended with exit code {done.returncode}: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def versions() -> dict[str, Any]:
    from megavlm.tracking.environment import environment_report

    return environment_report()


# --------------------------------------------------------------------------------------------------------------- tests


def gpu_tests(place: Place) -> dict[str, Any]:
    """Counts of the tests marked `gpu`, and what failed; where there is no GPU all of them are collected and skipped."""
    results = Path(place.folder) / "gpu-tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests/gpu", f"--junitxml={results}", "-p", "no:cacheprovider"]
    if place.device == "cuda" and find_spec("xdist") is not None:
        command += ["-n", str(TEST_PROCESSES), "--dist", "load"]
    if place.limit_s > 2 * TEST_RESERVE_S and _version("pytest-timeout") >= (2, 3):
        # pytest then stops between two tests and still writes what it knows.
        command.append(f"--session-timeout={place.limit_s - TEST_RESERVE_S:.0f}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    told = (done.stdout + done.stderr)[-3000:]
    if not results.is_file():
        raise RuntimeError(f"pytest ended with exit code {done.returncode} and wrote no results: {told}")
    found = read_junit(results)
    if not found["collected"]:
        raise RuntimeError(f"pytest ended with exit code {done.returncode} and ran nothing: {told}")
    note = "no GPU: every test was collected and skipped" if place.tiny else "the GPU's own tests"
    return {"note": note, "ended_early": "session-timeout" in done.stdout, **found}


def _version(distribution: str) -> tuple[int, ...]:
    """(0,) where it is not installed."""
    try:
        return tuple(int(part) for part in re.findall(r"\d+", metadata.version(distribution))[:2])
    except metadata.PackageNotFoundError:
        return (0,)


def read_junit(results: Path) -> dict[str, Any]:
    """Counts by outcome, messages of the first failures, and how often each reason for skipping was given."""
    outcomes: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    failures = {}
    for case in ElementTree.parse(results).iter("testcase"):
        outcome, message = "passed", ""
        for kind in ("skipped", "failure", "error"):
            if (node := case.find(kind)) is not None:
                outcome, message = kind, node.get("message") or ""
        outcomes[outcome] += 1
        if outcome == "skipped":
            skipped[message[:200]] += 1
        elif outcome != "passed" and len(failures) < MOST_MESSAGES:
            failures[f"{case.get('classname')}::{case.get('name')}"] = message[:500]
    counts = {"passed": outcomes["passed"], "skipped": outcomes["skipped"], "failed": outcomes["failure"] + outcomes["error"]}
    return {"collected": sum(counts.values()), **counts, "failures": failures, "reasons_to_skip": dict(skipped.most_common())}


# ------------------------------------------------------------------------------------------------------------ ceilings


def milliseconds(function: Callable[[], object], device: str, rounds: int = 20, warm_up: int = 3) -> float:
    """Median time of a call: between events on CUDA, of the process on a CPU."""
    from timing import take_turns

    for _ in range(warm_up if device == "cuda" else 0):
        function()
    return 1e3 * statistics.median(take_turns({"": function}, rounds if device == "cuda" else 3, device)[""])


def _square(tiny: bool, device: str) -> tuple[Any, Any]:
    """Random numbers: a product of zeros runs faster than the chip allows for real ones."""
    import torch

    side = 256 if tiny else 8192
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(side, side, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    return a, b


def matmul_bf16(tiny: bool, device: str) -> dict[str, Any]:
    """A square product."""
    a, b = _square(tiny, device)
    return _rate(lambda: a @ b, len(a), device)


def _rate(product: Callable[[], object], side: int, device: str) -> dict[str, Any]:
    ms = milliseconds(product, device)
    return {"side": side, "ms": ms, "tflops": 2 * side**3 / ms / 1e9}


def matmul_fp8_tensorwise(tiny: bool, device: str) -> dict[str, Any]:
    return _matmul_fp8(tiny, device, by_row=False)


def matmul_fp8_rowwise(tiny: bool, device: str) -> dict[str, Any]:
    return _matmul_fp8(tiny, device, by_row=True)


def _matmul_fp8(tiny: bool, device: str, by_row: bool) -> dict[str, Any]:
    """torch._scaled_mm with fast accumulation, as forward products use it; operands are cast before."""
    import torch

    from megavlm_kernels.fp8_cast import E4M3, fp8_cast

    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise Unavailable(f"no FP8 products before compute capability 8.9, this GPU has {torch.cuda.get_device_capability()}")
    left, right = (fp8_cast(x, E4M3, by_row=by_row) for x in _square(tiny, device))
    scales = {"scale_a": left.scale, "scale_b": right.scale.t() if by_row else right.scale}
    fast = {"use_fast_accum": True} if device == "cuda" else {}
    product = lambda: torch._scaled_mm(left.data_PC, right.data_PC.t(), **scales, out_dtype=torch.bfloat16, **fast)  # noqa: E731
    return _rate(product, len(left.data_PC), device)


def copy(tiny: bool, device: str) -> dict[str, Any]:
    """Bytes read and written by a copy that no cache holds."""
    import torch

    source = torch.randint(0, 256, (1 << (20 if tiny else 31),), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ms = milliseconds(lambda: target.copy_(source), device)
    return {"bytes": source.numel(), "ms": ms, "bytes_per_s": 2e3 * source.numel() / ms}
