"""What `rotary` computes, in plain torch; in fp64 it is the truth that tests compare with."""

from __future__ import annotations

import torch


def rotary_reference(x_LHK: torch.Tensor, cos_LW: torch.Tensor, sin_LW: torch.Tensor) -> torch.Tensor:
    """Rotate the leading W elements of each head of (L, H, K): element i with element i + W / 2, the half-split order of Llama."""
    width = cos_LW.shape[-1]
    turned, rest = x_LHK[..., :width], x_LHK[..., width:]
    first, second = turned.chunk(2, dim=-1)
    out = (turned * cos_LW[:, None, :] + torch.cat([-second, first], dim=-1) * sin_LW[:, None, :]).to(x_LHK.dtype)
    return out if rest.shape[-1] == 0 else torch.cat([out, rest], dim=-1)
