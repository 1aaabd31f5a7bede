"""What `rms_norm` computes, in three lines of torch; in fp64 it is the truth that tests compare with."""

from __future__ import annotations

import torch


def rms_norm_reference(x: torch.Tensor, weight_D: torch.Tensor, eps: float, zero_centered: bool = False) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) x weight, or x (1 + weight), over the last dim of (..., D); in at least fp32, out in x's format."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    factor_D = weight_D.to(wide.dtype) + float(zero_centered)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * factor_D).to(x.dtype)
