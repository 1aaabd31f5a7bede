"""Peak arithmetic rate of one device: the denominator of model FLOPs utilisation (MFU)."""

from __future__ import annotations

import functools
import time
from typing import Literal

Dtype = Literal["fp32", "tf32", "bf16", "fp16", "fp8"]

CPU_MEASURE_S = 0.15
CPU_MATRIX_SIDE = 512

# Dense TFLOPS (sparsity off) with fp32 accumulation, from NVIDIA's data sheets; where a sheet states only rates with
# 2:4 sparsity, half of it. fp32 is the rate outside tensor cores: what torch uses unless TF32 is allowed.
# The first entry all of whose words appear in the device's name wins, so the special ones come first.
_PEAKS: tuple[tuple[tuple[str, ...], dict[str, float]], ...] = (
    # Blackwell: "NVIDIA Blackwell Architecture Technical Overview"; HGX B200 and GB200 NVL72 sheets, divided by their GPUs.
    (("gb200",), {"bf16": 2500.0, "fp8": 5000.0, "tf32": 1250.0, "fp32": 80.0}),
    (("b200",), {"bf16": 2250.0, "fp8": 4500.0, "tf32": 1125.0, "fp32": 75.0}),
    # Hopper: "NVIDIA H100 Tensor Core GPU" and "NVIDIA H200 Tensor Core GPU" data sheets; GH200 superchip sheet.
    (("gh200",), {"bf16": 989.5, "fp8": 1979.0, "tf32": 494.5, "fp32": 67.0}),
    (("h200", "nvl"), {"bf16": 835.5, "fp8": 1671.0, "tf32": 417.5, "fp32": 60.0}),
    (("h200",), {"bf16": 989.5, "fp8": 1979.0, "tf32": 494.5, "fp32": 67.0}),
    (("h100", "nvl"), {"bf16": 835.5, "fp8": 1671.0, "tf32": 417.5, "fp32": 60.0}),
    (("h100", "pcie"), {"bf16": 756.5, "fp8": 1513.0, "tf32": 378.0, "fp32": 51.0}),
    (("h100",), {"bf16": 989.5, "fp8": 1979.0, "tf32": 494.5, "fp32": 67.0}),
    # Ampere: "NVIDIA A100", "A40", "A30", "A10" data sheets and the RTX A6000 sheet.
    (("a100",), {"bf16": 312.0, "tf32": 156.0, "fp32": 19.5}),
    (("a6000",), {"bf16": 154.8, "tf32": 77.4, "fp32": 38.7}),
    (("a40",), {"bf16": 149.7, "tf32": 74.8, "fp32": 37.4}),
    (("a30",), {"bf16": 165.0, "tf32": 82.0, "fp32": 10.3}),
    (("a10",), {"bf16": 125.0, "tf32": 62.5, "fp32": 31.2}),
    # Ada: "NVIDIA L40S", "L40", "L4" data sheets; "RTX 6000 Ada" sheet; "NVIDIA Ada GPU Architecture" v2.0, table 2.
    (("l40s",), {"bf16": 362.05, "fp8": 733.0, "tf32": 183.0, "fp32": 91.6}),
    (("l40",), {"bf16": 181.05, "fp8": 362.0, "tf32": 90.5, "fp32": 90.5}),
    (("l4",), {"bf16": 121.0, "fp8": 242.5, "tf32": 60.0, "fp32": 30.3}),
    (("6000", "ada"), {"bf16": 364.2, "fp8": 728.5, "tf32": 182.1, "fp32": 91.1}),
    (("rtx", "4090"), {"bf16": 165.2, "fp8": 330.3, "tf32": 82.6, "fp32": 82.6}),
    # "NVIDIA RTX Blackwell GPU Architecture" v1.1 and "NVIDIA Ampere GA102 GPU Architecture" v2.1, appendix tables.
    (("rtx", "5090"), {"bf16": 209.5, "fp8": 419.0, "tf32": 104.8, "fp32": 104.8}),
    (("rtx", "3090"), {"bf16": 71.0, "tf32": 35.6, "fp32": 35.6}),
)

# Parts and slower kin of a device on the list: their names hold the same words, their peak is another.
_NOT_THE_WHOLE = {"mig", "laptop", "max", "d"}


class UnknownDevice(ValueError):
    """No peak rate is known for this device and number format."""


def peak_tflops(device_name: str | None, dtype: Dtype = "bf16") -> float:
    """Dense peak of one device in TFLOPS (10^12 floating point operations a second).

    Args:
        device_name: as `torch.cuda.get_device_name()` spells it. None: this CPU, whose matmul rate is measured
            (under 0.3 s, once a process, with the threads that torch may use now).
        dtype: format of the matrix multiplications. fp16 has the rate of bf16 on every device of the list.

    Raises UnknownDevice, which says what to set in the recipe.
    """
    if device_name is None:
        return _measured_cpu_tflops(dtype)
    words = device_name.lower().replace("-", " ").split()
    for needed, rates in _PEAKS:
        # "A100-SXM4-40GB" must match a100, "L40S" must not match l4: compare whole words.
        if all(word in words for word in needed) and not _NOT_THE_WHOLE.intersection(words):
            same = "bf16" if dtype == "fp16" else dtype
            if same in rates:
                return rates[same]
            raise UnknownDevice(f"{device_name!r} has no {dtype} arithmetic on record: set tracking.peak_tflops_per_rank")
    raise UnknownDevice(f"the peak rate of {device_name!r} is not known: set tracking.peak_tflops_per_rank to its dense {dtype} TFLOPS")


@functools.cache
def _measured_cpu_tflops(dtype: str) -> float:
    """Best rate of a square matmul; the best of several because other processes only ever make it slower."""
    import torch

    formats = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if dtype not in formats:
        raise UnknownDevice(f"a CPU has no {dtype} arithmetic: set precision.dtype to fp32, bf16 or fp16")
    side = CPU_MATRIX_SIDE
    with torch.no_grad():
        left = torch.ones(side, side, dtype=formats[dtype])
        right = torch.ones(side, side, dtype=formats[dtype])
        torch.matmul(left, right)  # the first call sets up threads and code for the shape
        best_s, end = float("inf"), time.perf_counter() + CPU_MEASURE_S
        while (began := time.perf_counter()) < end:
            torch.matmul(left, right)
            best_s = min(best_s, time.perf_counter() - began)
    return 2.0 * side**3 / best_s / 1e12
