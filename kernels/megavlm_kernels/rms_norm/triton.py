"""Triton kernels of the root-mean-square norm: one program holds whole rows; wide rows one at a time, narrow ones (heads) many."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from megavlm_kernels.rms_norm.limits import MAX_TRITON_WIDTH
from megavlm_kernels.testing.ahead_of_time import Variant

FORMATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
WEIGHT_PARTS = 264
"""Partial sums of the weight gradient: two for each of a Hopper's 132 multiprocessors, on any device, so that sums have one order."""

MAX_WIDTH_OF_BOTH = 4096
"""Up to here one sweep gives both gradients; above, the sums of the weight gradient would push others out of the registers."""


@triton.jit
def _forward_kernel(
    x, weight, out, scale, num_rows, width, stride, eps, ZERO_CENTERED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    row_start = row.to(tl.int64)[:, None]
    values = tl.load(x + row_start * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    if ZERO_CENTERED:
        factor += 1.0
    r = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / width + eps)
    tl.store(out + row_start * width + column[None, :], (values * r[:, None] * factor[None, :]).to(out.dtype.element_ty), mask=inside)
    tl.store(scale + row, r, mask=row < num_rows)


@triton.jit
def _backward_kernel(
    grad,
    x,
    weight,
    scale,
    grad_x,
    grad_weight_parts,
    num_rows,
    width,
    grad_stride,
    x_stride,
    blocks_per_program,
    ZERO_CENTERED: tl.constexpr,
    WANTS_X: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    program = tl.program_id(0)
    column = tl.arange(0, WIDTH)
    weight_sum = tl.zeros((WIDTH,), dtype=tl.float32)
    for block in range(blocks_per_program):
        row = (program * blocks_per_program + block) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (column < width)[None, :]
        row_start = row.to(tl.int64)[:, None]
        r = tl.load(scale + row, mask=row < num_rows, other=0.0)[:, None]
        upstream = tl.load(grad + row_start * grad_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(x + row_start * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32) * r
        if WANTS_WEIGHT:
            weight_sum += tl.sum(upstream * normed, axis=0)
        if WANTS_X:
            # Read again for each block of rows: it stays in the first cache and leaves registers to what does not.
            factor = tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
            if ZERO_CENTERED:
                factor += 1.0
            upstream *= factor[None, :]
            mean = tl.sum(upstream * normed, axis=1) / width
            change = r * (upstream - normed * mean[:, None])
            tl.store(grad_x + row_start * width + column[None, :], change.to(grad_x.dtype.element_ty), mask=inside)
    if WANTS_WEIGHT:
        tl.store(grad_weight_parts + program * width + column, weight_sum, mask=column < width)


def block_shape(width: int) -> tuple[int, int, int]:
    """(rows of a program, columns of a program, warps): at most 16 elements a thread up to MAX_TRITON_WIDTH columns."""
    columns = max(16, triton.next_power_of_2(width))
    rows = max(1, min(8, 1024 // columns))
    return rows, columns, min(32, max(4, rows * columns // 512))


def forward(x_RD: torch.Tensor, weight_D: torch.Tensor, eps: float, zero_centered: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed rows (R, D), r of each row (R, 1) in fp32)."""
    x_RD, weight_D = _rows(x_RD), weight_D.contiguous()
    num_rows, width = x_RD.shape
    out_RD = torch.empty((num_rows, width), dtype=x_RD.dtype, device=x_RD.device)
    scale_R1 = torch.empty((num_rows, 1), dtype=torch.float32, device=x_RD.device)
    if num_rows:
        rows, columns, warps = block_shape(width)
        grid, shape = (triton.cdiv(num_rows, rows),), (num_rows, width, x_RD.stride(0))
        _forward_kernel[grid](x_RD, weight_D, out_RD, scale_R1, *shape, eps, zero_centered, rows, columns, num_warps=warps)
    return out_RD, scale_R1


def backward(
    grad_RD: torch.Tensor,
    x_RD: torch.Tensor,
    weight_D: torch.Tensor,
    scale_R1: torch.Tensor,
    zero_centered: bool,
    wants_x: bool,
    wants_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x (R, D) and of the weight (D), each None where it is not wanted."""
    grad_RD, x_RD, weight_D = _rows(grad_RD), _rows(x_RD), weight_D.contiguous()
    num_rows, width = x_RD.shape
    if wants_x and wants_weight and width > MAX_WIDTH_OF_BOTH:
        same = (grad_RD, x_RD, weight_D, scale_R1, zero_centered)
        return backward(*same, True, False)[0], backward(*same, False, True)[1]
    rows, columns, warps = block_shape(width)
    blocks = triton.cdiv(num_rows, rows)
    blocks_per_program = triton.cdiv(blocks, WEIGHT_PARTS) if wants_weight else 1
    programs = triton.cdiv(blocks, blocks_per_program) if blocks else 0
    grad_x = torch.empty((num_rows, width), dtype=x_RD.dtype, device=x_RD.device) if wants_x else None
    parts = torch.empty((programs, width), dtype=torch.float32, device=x_RD.device) if wants_weight else None
    if programs:
        _backward_kernel[(programs,)](
            grad_RD,
            x_RD,
            weight_D,
            scale_R1,
            grad_x if grad_x is not None else grad_RD,
            parts if parts is not None else scale_R1,
            num_rows,
            width,
            grad_RD.stride(0),
            x_RD.stride(0),
            blocks_per_program,
            zero_centered,
            wants_x,
            wants_weight,
            rows,
            columns,
            num_warps=warps,
        )
    return grad_x, None if parts is None else parts.sum(0).to(weight_D.dtype)


def _rows(x_RD: torch.Tensor) -> torch.Tensor:
    """Rows may lie apart, their elements may not."""
    return x_RD if x_RD.stride(1) == 1 else x_RD.contiguous()


def variants() -> Iterator[Variant]:
    """All formats at a usual width, and all block shapes from a head's width to the largest in bf16 with fp32 weights."""
    cases = [(4096, kind, kind) for kind in FORMATS.values()]
    cases += [(width, "bf16", "fp32") for width in (16, 64, 128, 256, 512, 1024, 2048, MAX_TRITON_WIDTH)]
    for width, kind, weight_kind in cases:
        rows, columns, warps = block_shape(width)
        shape: dict[str, Any] = {"ZERO_CENTERED": True, "ROWS": rows, "WIDTH": columns}
        numbers = {"num_rows": "i32", "width": "i32"}
        tensors = {"x": f"*{kind}", "weight": f"*{weight_kind}", "scale": "*fp32"}
        signature = {**tensors, "out": f"*{kind}", **numbers, "stride": "i32", "eps": "fp32"}
        yield Variant(_forward_kernel, signature, shape, {"num_warps": warps})
        signature = {**tensors, "grad": f"*{kind}", "grad_x": f"*{kind}", "grad_weight_parts": "*fp32", **numbers}
        signature |= {"grad_stride": "i32", "x_stride": "i32", "blocks_per_program": "i32"}
        wants = [(True, True)] if width <= MAX_WIDTH_OF_BOTH else [(True, False), (False, True)]
        for wants_x, wants_weight in wants:
            yield Variant(_backward_kernel, signature, {**shape, "WANTS_X": wants_x, "WANTS_WEIGHT": wants_weight}, {"num_warps": warps})
    # What else differs, at one width each.
    rows, columns, warps = block_shape(4096)
    plain = {"ZERO_CENTERED": False, "ROWS": rows, "WIDTH": columns}
    options = {"num_warps": warps}
    signature = {"x": "*bf16", "weight": "*bf16", "scale": "*fp32", "out": "*bf16", **numbers, "stride": "i32", "eps": "fp32"}
    yield Variant(_forward_kernel, signature, plain, options)
    signature = {"x": "*bf16", "weight": "*bf16", "scale": "*fp32", "grad": "*bf16", "grad_x": "*bf16", "grad_weight_parts": "*fp32"}
    signature |= {**numbers, "grad_stride": "i32", "x_stride": "i32", "blocks_per_program": "i32"}
    for wants_x, wants_weight in ((True, True), (True, False), (False, True)):
        yield Variant(_backward_kernel, signature, {**plain, "WANTS_X": wants_x, "WANTS_WEIGHT": wants_weight}, options)
