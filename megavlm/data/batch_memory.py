"""A PackedBatch in memory that two processes share, without a copy on the receiving side.

The memory is an anonymous file that travels as a file descriptor. It has no name, so that nothing is left behind when a process is
killed, and it does not count against /dev/shm, which containers keep at 64 MB.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
from dataclasses import fields, replace
from typing import Any

import torch

from megavlm.data.types import PackedBatch

_ALIGN_BYTES = 64
_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)


def write_batch(batch: PackedBatch) -> tuple[bytes, int]:
    """(description, file descriptor) of a batch; the caller closes the descriptor."""
    tensors = {f.name: v for f in fields(batch) if isinstance(v := getattr(batch, f.name), torch.Tensor)}
    places, size = {}, 0
    for name, tensor in tensors.items():
        places[name] = (tensor.dtype, tuple(tensor.shape), size)
        size += -(-tensor.numel() * tensor.element_size() // _ALIGN_BYTES) * _ALIGN_BYTES
    size = max(size, mmap.PAGESIZE)
    file = _anonymous_file(size)
    memory = mmap.mmap(file, size, flags=_FLAGS)
    for name, tensor in tensors.items():
        _view(memory, *places[name]).copy_(tensor)
    nothing: dict[str, Any] = dict.fromkeys(tensors)
    rest = replace(batch, **nothing)
    return pickle.dumps((rest, places, size), protocol=pickle.HIGHEST_PROTOCOL), file


def read_batch(description: bytes, file: int) -> PackedBatch:
    """The batch of `write_batch`; its tensors are the shared memory itself, freed with the last of them. Closes `file`."""
    try:
        rest, places, size = pickle.loads(description)
        memory = mmap.mmap(file, size, flags=_FLAGS)
    finally:
        os.close(file)
    tensors: dict[str, Any] = {name: _view(memory, *place) for name, place in places.items()}
    batch: PackedBatch = replace(rest, **tensors)
    return batch


def _view(memory: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> torch.Tensor:
    count = 1
    for n in shape:
        count *= n
    if count == 0:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)


def _anonymous_file(size: int) -> int:
    if hasattr(os, "memfd_create"):
        file = os.memfd_create("megavlm-batch", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as unnamed:
            file = os.dup(unnamed.fileno())
    os.ftruncate(file, size)
    return file
