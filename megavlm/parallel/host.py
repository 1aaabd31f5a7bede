"""Small tables from the host to the device without a halt: the host is to run ahead of a GPU, not to wait for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def on_device(values: Sequence[int] | Sequence[bool], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor of plain numbers. From unpinned memory CUDA would first finish all it was given."""
    table = torch.tensor(values, dtype=dtype)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)


def numbers_of_rows(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """(sum of lengths): 0 for the first `lengths[0]` rows, 1 for the next `lengths[1]`, and so on."""
    numbers, counts = torch.arange(len(lengths), device=device), on_device(lengths, device)
    return torch.repeat_interleave(numbers, counts, output_size=sum(lengths))  # without the size, the host waits for the sum
