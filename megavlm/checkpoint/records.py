"""A tensor as torch.save writes it, laid out without its values.

With torch's zip checksums off, the bytes around a tensor's values depend on its format and shape alone. So the layout of a whole file
of tensors is known before there are any values, and values are read straight from where they lie. The files are those of
torch.distributed.checkpoint: torch.load reads every record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch

ALIGNMENT_BYTES = 64
"""Records begin at multiples of this in their file; torch.save aligns values to it inside of a record."""


class Record(NamedTuple):
    """The bytes before a tensor's values, how many bytes the values take, and the bytes behind them."""

    before: bytes
    num_bytes: int
    behind: bytes

    @property
    def length(self) -> int:
        """Bytes of the record."""
        return len(self.before) + self.num_bytes + len(self.behind)


@lru_cache(maxsize=65536)
def record_of(dtype: torch.dtype, sizes: tuple[int, ...]) -> Record:
    """The record of a contiguous tensor."""
    num_bytes = math.prod(sizes) * dtype.itemsize
    # Address space that nobody touches: not a byte of it becomes memory.
    storage = torch.UntypedStorage(num_bytes)
    tensor = torch.empty(0, dtype=dtype).set_(storage, 0, sizes)  # type: ignore[call-overload]
    sink = _Sink(storage.data_ptr(), num_bytes)
    with without_crc():
        torch.save(tensor, sink)  # type: ignore[arg-type]
    assert sink.passed == num_bytes, "torch.save writes a tensor's values in another way: see _Sink"
    return Record(b"".join(sink.before), num_bytes, b"".join(sink.behind))


class _Sink:
    """A file that keeps all that is written to it but what lies in the storage's memory."""

    def __init__(self, address: int, num_bytes: int) -> None:
        self._start, self._end = address, address + num_bytes
        self.before: list[bytes] = []
        self.behind: list[bytes] = []
        self.passed = 0

    def write(self, data: Any) -> int:
        view = np.frombuffer(data, dtype=np.uint8)
        address = view.__array_interface__["data"][0]
        if len(view) and self._start <= address < self._end:
            self.passed += len(view)
        else:
            (self.behind if self.passed else self.before).append(bytes(data))
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""


@contextmanager
def without_crc() -> Iterator[None]:
    """torch's zip checksums off: the manifest's checksum covers every byte, and nothing reads them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
