"""Small tables on the device, made without a halt of the host."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavlm_kernels.transfer import to_device


def on_device(values: Sequence[int] | Sequence[bool], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """A tensor of plain numbers."""
    return to_device(torch.tensor(values, dtype=dtype), device)


def numbers_of_rows(lengths: Sequence[int], device: torch.device) -> torch.Tensor:
    """(sum of lengths): 0 for the first `lengths[0]` rows, 1 for the next `lengths[1]`, and so on."""
    numbers, counts = torch.arange(len(lengths), device=device), on_device(lengths, device)
    return torch.repeat_interleave(numbers, counts, output_size=sum(lengths))  # without the size, the host waits for the sum
