"""Triton kernels of the softmax, the loss and its gradient over the logits of one chunk, which are read twice and written once.

The vocabulary is cut into blocks: with few rows and 150 thousand columns, a program a row would leave most of a GPU idle.

Shape legend: Q rows of a chunk, V local columns, J blocks of columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from megavlm_kernels.testing.ahead_of_time import Variant

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WIDEST_BLOCK = 4096


@triton.jit
def _tanh(x):
    # Between -1 and 1 whatever overflows: exp of a large number is infinite, 2 / infinity is 0.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _statistics_kernel(
    logits, target, peaks, sums, target_logits, num_columns, num_real, softcap, HAS_SOFTCAP: tl.constexpr, BLOCK: tl.constexpr
):
    row, block, blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < num_real
    x = tl.load(logits + row.to(tl.int64) * num_columns + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        x = softcap * _tanh(x / softcap)
    peak = tl.max(tl.where(inside, x, float("-inf")), axis=0)
    # In a block of padding alone the peak is -inf and its differences are no numbers; none of them counts.
    total = tl.sum(tl.where(inside, tl.exp(x - peak), 0.0), axis=0)
    own = (column == tl.load(target + row)) & inside
    place = row.to(tl.int64) * blocks + block
    tl.store(peaks + place, peak)
    tl.store(sums + place, total)
    tl.store(target_logits + place, tl.sum(tl.where(own, x, 0.0), axis=0))


@triton.jit
def _gradient_kernel(
    logits,
    target,
    peak,
    denominator,
    drift,
    loss_weight,
    num_columns,
    num_real,
    softcap,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, block = tl.program_id(0), tl.program_id(1)
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside, real = column < num_columns, column < num_real
    place = logits + row.to(tl.int64) * num_columns + column
    x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    slope = 1.0
    if HAS_SOFTCAP:
        x = _tanh(x / softcap)
        slope = 1.0 - x * x
        x = softcap * x
    # Not exp(x - log Z): the rounding of log Z would be in every probability.
    probability = tl.exp(x - tl.load(peak + row)) / tl.load(denominator + row)
    gradient = (probability - tl.where(column == tl.load(target + row), 1.0, 0.0)) + tl.load(drift + row) * probability
    gradient = tl.where(real, gradient * tl.load(loss_weight + row) * slope, 0.0)
    tl.store(place, gradient.to(logits.dtype.element_ty), mask=inside)


def block_shape(num_columns: int) -> tuple[int, int]:
    """(columns of a program, warps): 16 columns a thread where there are so many."""
    block = min(WIDEST_BLOCK, max(32, triton.next_power_of_2(num_columns)))
    return block, max(1, block // 512)


def statistics(
    logits_QV: torch.Tensor, target_Q: torch.Tensor, num_real: int, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(maxima (Q, J), sums of exp(logit - maximum) (Q, J), logit of the target (Q,), 0 where it is no column here), in fp32."""
    rows, columns = logits_QV.shape
    block, warps = block_shape(columns)
    grid = (rows, triton.cdiv(columns, block))
    peaks, sums, targets = torch.empty((3, *grid), dtype=torch.float32, device=logits_QV.device)
    has_softcap = softcap is not None
    arguments = (logits_QV, target_Q, peaks, sums, targets, columns, num_real, softcap or 1.0)
    _statistics_kernel[grid](*arguments, has_softcap, block, num_warps=warps)
    return peaks, sums, targets.sum(1)


def gradient_(
    logits_QV: torch.Tensor,
    target_Q: torch.Tensor,
    peak_Q: torch.Tensor,
    denominator_Q: torch.Tensor,
    drift_Q: torch.Tensor,
    loss_weight_Q: torch.Tensor,
    num_real: int,
    softcap: float | None,
) -> torch.Tensor:
    """Gradient of the weighted loss for the logits, in their place and format; `drift_Q` is the z-loss's, 2 x z_loss x log Z."""
    rows, columns = logits_QV.shape
    block, warps = block_shape(columns)
    grid, has_softcap = (rows, triton.cdiv(columns, block)), softcap is not None
    of_rows = (target_Q, peak_Q, denominator_Q, drift_Q, loss_weight_Q)
    _gradient_kernel[grid](logits_QV, *of_rows, columns, num_real, softcap or 1.0, has_softcap, block, num_warps=warps)
    return logits_QV


def variants() -> Iterator[Variant]:
    """Formats x soft cap x widths: a small vocabulary, and all that fill a block."""
    for dtype in FORMATS.values():
        for has_softcap in (False, True):
            for columns in (64, 1000, 152064):
                block, warps = block_shape(columns)
                constants: dict[str, Any] = {"HAS_SOFTCAP": has_softcap, "BLOCK": block}
                sizes = {"num_columns": "i32", "num_real": "i32", "softcap": "fp32"}
                given = {"logits": f"*{dtype}", "target": "*i64"}
                parts = {"peaks": "*fp32", "sums": "*fp32", "target_logits": "*fp32"}
                rows = dict.fromkeys(("peak", "denominator", "drift", "loss_weight"), "*fp32")
                yield Variant(_statistics_kernel, {**given, **parts, **sizes}, constants, {"num_warps": warps})
                yield Variant(_gradient_kernel, {**given, **rows, **sizes}, constants, {"num_warps": warps})
