"""What `scatter_features` computes, in one line of torch that autograd differentiates."""

from __future__ import annotations

import torch


def scatter_features_reference(x: torch.Tensor, features: torch.Tensor, positions_N: torch.Tensor) -> torch.Tensor:
    """(S, ...) with the rows `positions_N` replaced by (N, ...), in x's format."""
    return x.index_put((positions_N,), features.to(x.dtype))
