"""CLIP's sigmoid approximation of GELU and its slope, in plain torch: for activations by themselves and for gates."""

from __future__ import annotations

import torch


def quick_gelu(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """x sigmoid(1.702 x), into `out` where it is given."""
    return torch.mul(x, torch.sigmoid(1.702 * x), out=out)


def times_quick_gelu_slope(grad: torch.Tensor, x: torch.Tensor, out: torch.Tensor) -> None:
    """Write the gradient of x into `out`, given that of `quick_gelu(x)`."""
    sigmoid = torch.sigmoid(1.702 * x)
    # d(x sigmoid) = sigmoid (1 + 1.702 x (1 - sigmoid))
    slope = (1.0 - sigmoid).mul_(x).mul_(1.702).add_(1.0).mul_(sigmoid)
    torch.mul(grad, slope, out=out)
