"""What the layer computes: operands rounded to FP8, products in fp64.

Shape legend: M rows, K input width, N output width.
"""

from __future__ import annotations

import torch

from megavlm_kernels.fp8_cast.reference import E4M3, E5M2, fp8_cast


def rounded(x: torch.Tensor, dtype: torch.dtype, by_row: bool) -> torch.Tensor:
    """`x` as FP8 holds it, scaled along its rows' last dim, in fp64."""
    cast = fp8_cast(x, dtype, by_row=by_row, multiple=1)
    return cast.data_PC.double() * cast.scale.double()


def fp8_linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, grad_MN: torch.Tensor, *, by_row: bool = False, hybrid: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(output, gradient of x, gradient of the weight) in fp64."""
    kind = E5M2 if hybrid else E4M3
    out = rounded(x_MK, E4M3, by_row) @ rounded(weight_NK, E4M3, by_row).T
    grad_x = rounded(grad_MN, kind, by_row) @ rounded(weight_NK.T, E4M3, by_row).T
    grad_weight = rounded(grad_MN.T, kind, by_row) @ rounded(x_MK.T, E4M3, by_row).T
    return out, grad_x, grad_weight
