"""Cast to FP8 and transpose in one sweep, after one for the maxima.

A matrix product in FP8 needs both operands with the summed dimension innermost, so activations, weights and gradients are each read
along rows in one product and along columns in another. Done with plain operations (maximum, division, cast, transposition, cast) that
costs more than FP8 saves.

Shape legend: R rows, C columns, P rows with padding.
"""

from __future__ import annotations

import torch

from megavlm_kernels.backend import uses_triton
from megavlm_kernels.fp8_cast import reference
from megavlm_kernels.fp8_cast.reference import Fp8Matrix


@torch.no_grad()
def fp8_cast(x_RC: torch.Tensor, dtype: torch.dtype, *, by_row: bool = False, transpose: bool = False, multiple: int = 16) -> Fp8Matrix:
    """(R, C) in the FP8 format `dtype`, with rows of zeros up to a multiple of `multiple`.

    One scale for the whole matrix, or with `by_row` one for each row of what is multiplied: rows of the matrix, and its columns for the
    transposed one. Scales are powers of two (see `reference`). Whatever shares a scale with an infinity or a NaN becomes NaN. R may be 0;
    the input may have any strides. No gradient.
    """
    if uses_triton(x_RC) and x_RC.numel():
        from megavlm_kernels.fp8_cast.triton import cast

        return cast(x_RC, dtype, by_row, transpose, multiple)
    return reference.fp8_cast(x_RC, dtype, by_row=by_row, transpose=transpose, multiple=multiple)
