"""From the host to the device without a halt: the host is to run ahead of a GPU, not to wait for it."""

from __future__ import annotations

import torch


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy that the host does not wait for: from memory that is not pinned CUDA would first finish all it was given."""
    moves = device.type == "cuda" and not x.is_cuda
    return x.pin_memory().to(device, non_blocking=True) if moves else x.to(device)
