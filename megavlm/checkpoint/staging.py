"""A rank's files of a checkpoint in host memory: the bytes that go to the disk, filled with the tensors' values of one moment.

The memory is taken once and used for every save. Around the values stands already what torch.save writes there, so that a save copies
values and nothing else while training waits; on CUDA the memory is pinned and the copies run on the device's own copy engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavlm.checkpoint.pieces import Piece
from megavlm.checkpoint.records import record_of
from megavlm.checkpoint.shares import Shares


class Staging:
    """The memory of one model's saves."""

    def __init__(self, shares: Shares, device: torch.device) -> None:
        self.entries = shares.entries
        self.files: dict[str, torch.Tensor] = {}
        """Name -> bytes, in the order of `Shares.own_files`."""
        self._targets: list[tuple[int, torch.Tensor]] = []
        self._device = device
        for name, places, size in shares.own_files():
            # Written to now (torch.zeros would not): the first save must not wait for the system to find the pages.
            memory = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda").fill_(0)
            self.files[name] = memory
            for number, start in places:
                self._targets.append((number, _lay_out(memory, start, self.entries[number].dtype, self.entries[number].box.sizes)))

    @property
    def num_bytes(self) -> int:
        """Of all its files."""
        return sum(memory.numel() for memory in self.files.values())

    @torch.no_grad()
    def fill(self, pieces: Sequence[Piece]) -> None:
        """Copy the values of now. The pieces are those that the shares were agreed on for."""
        for number, target in self._targets:
            target.copy_(pieces[number].tensor, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _lay_out(memory: torch.Tensor, start: int, dtype: torch.dtype, sizes: tuple[int, ...]) -> torch.Tensor:
    """Write a record without its values at `start`; returns the place of the values."""
    record = record_of(dtype, sizes)
    values, behind = start + len(record.before), start + len(record.before) + record.num_bytes
    memory[start:values] = torch.frombuffer(bytearray(record.before), dtype=torch.uint8)
    memory[behind : start + record.length] = torch.frombuffer(bytearray(record.behind), dtype=torch.uint8)
    return memory[values:behind].view(dtype).view(sizes)
