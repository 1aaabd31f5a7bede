"""The cast in Triton: one sweep for absolute maxima, one that casts tiles and writes each twice, as it is and transposed.

Shape legend: R rows, C columns, P rows with padding.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from megavlm_kernels.backend import interprets
from megavlm_kernels.fp8_cast.reference import E4M3, TOP_EXPONENT, Fp8Matrix
from megavlm_kernels.testing.ahead_of_time import Variant

TILE = {"ROWS": 64, "COLUMNS": 64}
OPTIONS = {"num_warps": 4}


@triton.jit
def _tile(x, num_rows, num_columns, stride_row, stride_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's tile in fp32, 0 outside the matrix, and its row and column numbers."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < num_rows) & (columns[None, :] < num_columns)
    where = rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    return tl.load(x + where, mask=inside, other=0.0).to(tl.float32), rows, columns


@triton.jit
def _maximum(a, b):
    """Larger of two, and NaN when one is."""
    return tl.where((a > b) | (a != a), a, b)


@triton.jit
def _power_of_two(largest, TOP: tl.constexpr):
    """As `reference.power_of_two`, from the bits of fp32: sign, 8 of exponent (biased by 127), 23 of mantissa."""
    bits = largest.to(tl.int32, bitcast=True)
    biased = (bits >> 23) & 0xFF
    power = biased - 126 - TOP + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    power = tl.maximum(power, -126)
    power = tl.where(largest > 0.0, power, 0)
    return tl.where(biased < 255, ((power + 127) << 23).to(tl.float32, bitcast=True), float("nan"))


@triton.jit
def _to_fp8(x, kind: tl.constexpr, TOP: tl.constexpr, ROUND: tl.constexpr):
    """Nearest number in FP8, ties to even, as the hardware casts. Triton's interpreter cuts bits off: there (ROUND) adding and subtracting
    1.5 x 2^23 units in the last place rounds to what it then casts exactly, and a NaN is one that cutting leaves one."""
    if ROUND:
        MANTISSA: tl.constexpr = 3 if TOP == 9 else 2
        LEAST: tl.constexpr = 121 if TOP == 9 else 113  # biased exponents of 2^-6 and 2^-14, the smallest normal numbers
        biased = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 0xFF, LEAST)
        shift = ((biased - MANTISSA) << 23).to(tl.float32, bitcast=True) * 12582912.0
        x = (x + shift) - shift
        NOT_A_NUMBER: tl.constexpr = 0x7FF00000 if TOP == 9 else 0x7FE00000
        x = tl.where(x != x, tl.full(x.shape, NOT_A_NUMBER, tl.int32).to(tl.float32, bitcast=True), x)
    return x.to(kind)


@triton.jit
def absmax_kernel(
    x,
    by_row,
    by_column,
    num_rows,
    num_columns,
    stride_row,
    stride_column,
    BY_ROW: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Partial maxima: of the whole tile into by_row[tile], or of its rows into by_row[column tile, R] and its columns into
    by_column[row tile, C]."""
    tile, rows, columns = _tile(x, num_rows, num_columns, stride_row, stride_column, ROWS, COLUMNS)
    tile = tl.abs(tile)
    along_rows = tl.reduce(tile, 1, _maximum)
    if BY_ROW:
        tl.store(by_row + tl.program_id(1).to(tl.int64) * num_rows + rows, along_rows, mask=rows < num_rows)
        if TRANSPOSE:
            along_columns = tl.reduce(tile, 0, _maximum)
            tl.store(by_column + tl.program_id(0).to(tl.int64) * num_columns + columns, along_columns, mask=columns < num_columns)
    else:
        tl.store(by_row + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.reduce(along_rows, 0, _maximum))


@triton.jit
def cast_kernel(
    x,
    largest,
    largest_column,
    out,
    out_transposed,
    scale,
    scale_transposed,
    num_rows,
    num_columns,
    num_padded,
    stride_row,
    stride_column,
    BY_ROW: tl.constexpr,
    TRANSPOSE: tl.constexpr,
    TOP: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Cast a tile by its scales; the first program of each row and column of tiles writes these too."""
    tile, rows, columns = _tile(x, num_rows, num_columns, stride_row, stride_column, ROWS, COLUMNS)
    kind = out.dtype.element_ty
    inside = (rows[:, None] < num_padded) & (columns[None, :] < num_columns)
    where = rows[:, None].to(tl.int64) * num_columns + columns[None, :]
    if BY_ROW:
        factor = _power_of_two(tl.load(largest + rows, mask=rows < num_rows, other=0.0), TOP)
        if tl.program_id(1) == 0:
            tl.store(scale + rows, factor, mask=rows < num_padded)
        cast = _to_fp8(tile / factor[:, None], kind, TOP, ROUND)
    else:
        one = _power_of_two(tl.load(largest), TOP)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(scale, one)
        cast = _to_fp8(tile / one, kind, TOP, ROUND)
    tl.store(out + where, cast, mask=inside)
    if TRANSPOSE:
        if BY_ROW:
            other = _power_of_two(tl.load(largest_column + columns, mask=columns < num_columns, other=0.0), TOP)
            if tl.program_id(0) == 0:
                tl.store(scale_transposed + columns, other, mask=columns < num_columns)
            cast = _to_fp8(tile / other[None, :], kind, TOP, ROUND)
        turned = (columns[:, None] < num_columns) & (rows[None, :] < num_padded)
        where = columns[:, None].to(tl.int64) * num_padded + rows[None, :]
        tl.store(out_transposed + where, tl.trans(cast), mask=turned)


def cast(x_RC: torch.Tensor, dtype: torch.dtype, by_row: bool, transpose: bool, multiple: int) -> Fp8Matrix:
    """Launch both; see `op.fp8_cast`. There must be an element."""
    num_rows, num_columns = x_RC.shape
    padded = num_rows + -num_rows % multiple
    grid = (triton.cdiv(padded, TILE["ROWS"]), triton.cdiv(num_columns, TILE["COLUMNS"]))
    new: dict[str, Any] = {"device": x_RC.device, "dtype": torch.float32}
    partial = torch.empty((grid[1], num_rows) if by_row else (grid[0] * grid[1],), **new)
    partial_C = torch.empty((grid[0], num_columns), **new) if by_row and transpose else partial
    absmax_kernel[grid](
        x_RC, partial, partial_C, num_rows, num_columns, *x_RC.stride(), BY_ROW=by_row, TRANSPOSE=transpose, **TILE, **OPTIONS
    )
    largest = partial.amax(0)
    largest_C = partial_C.amax(0) if by_row and transpose else largest
    out = torch.empty((padded, num_columns), dtype=dtype, device=x_RC.device)
    scale = torch.empty((padded, 1) if by_row else (), **new)
    turned = torch.empty((num_columns, padded), dtype=dtype, device=x_RC.device) if transpose else None
    scale_C = torch.empty((num_columns, 1), **new) if by_row and transpose else scale
    cast_kernel[grid](
        x_RC,
        largest,
        largest_C,
        out,
        out if turned is None else turned,
        scale,
        scale_C,
        num_rows,
        num_columns,
        padded,
        *x_RC.stride(),
        BY_ROW=by_row,
        TRANSPOSE=transpose,
        TOP=TOP_EXPONENT[dtype],
        ROUND=interprets(),
        **TILE,
        **OPTIONS,
    )
    return Fp8Matrix(out, scale) if turned is None else Fp8Matrix(out, scale, turned, scale_C)


def variants() -> list[Variant]:
    """Every number format that training casts from, to both formats of FP8, with and without the transposed matrix."""
    found: list[Variant] = []
    sizes = {"num_rows": "i32", "num_columns": "i32", "stride_row": "i32", "stride_column": "i32"}
    for source in ("bf16", "fp16", "fp32"):
        for by_row in (False, True):
            for transpose in (False, True):
                flags = {"BY_ROW": by_row, "TRANSPOSE": transpose}
                kinds = {"x": f"*{source}", "by_row": "*fp32", "by_column": "*fp32", **sizes}
                found.append(Variant(absmax_kernel, kinds, {**flags, **TILE}, OPTIONS))
                for dtype, top in TOP_EXPONENT.items():
                    fp8 = "*fp8e4nv" if dtype == E4M3 else "*fp8e5"
                    kinds = {
                        "x": f"*{source}",
                        "largest": "*fp32",
                        "largest_column": "*fp32",
                        "out": fp8,
                        "out_transposed": fp8,
                        "scale": "*fp32",
                        "scale_transposed": "*fp32",
                        "num_padded": "i32",
                        **sizes,
                    }
                    found.append(Variant(cast_kernel, kinds, {**flags, "TOP": top, "ROUND": False, **TILE}, OPTIONS))
    return found
