"""What the cast computes, in plain torch.

FP8 is the pair of formats of Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433): e4m3 for weights and activations, e5m2 for
gradients. Scales are powers of two: they move no bit of a mantissa, so that a number rounds the same way whatever maximum it is scaled
by (but for those that fall below the format's range), and a matrix cut over ranks, each with its own maximum, gives nearly the bits of
the whole one.

Shape legend: R rows, C columns, P rows with padding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOP_EXPONENT = {E4M3: 9, E5M2: 16}
"""Of the largest number, which is 0.875 x 2^exponent in both formats: 448 and 57344."""


class Fp8Matrix(NamedTuple):
    """A matrix in FP8, row by row and, where asked for, transposed: a matrix product wants the dimension it sums over innermost."""

    data_PC: torch.Tensor
    scale: torch.Tensor
    """x is nearly data x scale: one number (), or one for each row (P, 1). fp32."""
    data_CP: torch.Tensor | None = None
    scale_C: torch.Tensor | None = None
    """() or, one for each row of the transposed matrix, (C, 1)."""


def fp8_cast(x_RC: torch.Tensor, dtype: torch.dtype, *, by_row: bool = False, transpose: bool = False, multiple: int = 16) -> Fp8Matrix:
    """`x_RC` in FP8 with rows of zeros up to a multiple of `multiple`; see `op.fp8_cast`."""
    num_rows, num_columns = x_RC.shape
    padding = -num_rows % multiple
    x = x_RC.float()
    scale = power_of_two(largest(x, 1 if by_row else None), dtype)
    data = torch.nn.functional.pad((x / scale).to(dtype).view(torch.uint8), (0, 0, 0, padding)).view(dtype)
    scale_P = torch.nn.functional.pad(scale, (0, 0, 0, padding), value=1.0) if by_row else scale
    if not transpose:
        return Fp8Matrix(data, scale_P)
    if not by_row:
        return Fp8Matrix(data, scale_P, data.view(torch.uint8).T.contiguous().view(dtype), scale)
    scale_C = power_of_two(largest(x, 0), dtype).view(num_columns, 1)
    data_CR = (x.T / scale_C).to(dtype).view(torch.uint8)
    return Fp8Matrix(data, scale_P, torch.nn.functional.pad(data_CR, (0, padding)).contiguous().view(dtype), scale_C)


def largest(x: torch.Tensor, dim: int | None) -> torch.Tensor:
    """Largest absolute value, of all or along `dim` (kept); 0 where there is none."""
    if dim is None:
        return x.abs().amax() if x.numel() else x.new_zeros(())
    if x.shape[dim] == 0:
        return x.new_zeros([1 if i == dim else size for i, size in enumerate(x.shape)])
    return x.abs().amax(dim, keepdim=True)


def power_of_two(largest: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The smallest power of two by which `largest` can be divided to be in range; 1 for 0.

    NaN for infinities and NaNs: casts to FP8 saturate, and an overflow must not pass for the largest number.
    """
    mantissa, exponent = torch.frexp(largest)  # largest = mantissa x 2^exponent, mantissa in [0.5, 1)
    power = exponent - TOP_EXPONENT[dtype] + (mantissa > 0.875).int()
    # 2^-126 is the smallest normal number: what is smaller yet is not worth more.
    scale = torch.ldexp(torch.ones_like(largest), torch.where(largest > 0, power.clamp(-126, 126), 0))
    return torch.where(torch.isfinite(largest), scale, float("nan"))
