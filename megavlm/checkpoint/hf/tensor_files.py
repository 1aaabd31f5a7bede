"""safetensors files by plain reads and writes: the length of a JSON header in 8 bytes, the header, then the tensors' bytes.

The library maps whole files, which fills a process's memory with pages of the file, and writes only what it holds in memory.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from megavlm.checkpoint.errors import HuggingFaceError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class Place:
    """Where a tensor's bytes lie in a file, and what they are."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file, read a tensor or some of its rows at a time.

    Raises:
        HuggingFaceError: the file is cut off or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY)
        try:
            self.places = self._header()
        except HuggingFaceError:
            os.close(self._handle)
            raise

    def read(self, name: str, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows first .. last of a tensor (None: up to its end), and no other byte."""
        place = self.places[name]
        if not place.shape:
            return self._filled(torch.empty((), dtype=place.dtype), place.start)
        rows = place.shape[0]
        last = rows if last is None else min(last, rows)
        row_bytes = place.nbytes // max(rows, 1)
        return self._filled(torch.empty((max(last - first, 0), *place.shape[1:]), dtype=place.dtype), place.start + first * row_bytes)

    def close(self) -> None:
        os.close(self._handle)

    def _filled(self, tensor: torch.Tensor, offset: int) -> torch.Tensor:
        view = raw_bytes(tensor)
        while view:
            count = os.preadv(self._handle, [view], offset)
            if not count:
                raise self._damaged("it ends before its tensors do")
            view, offset = view[count:], offset + count
        return tensor

    def _header(self) -> dict[str, Place]:
        size = os.fstat(self._handle).st_size
        length = int.from_bytes(os.pread(self._handle, 8, 0), "little")
        if size < 8 or not 0 < length <= min(size - 8, _MAX_HEADER):
            raise self._damaged("its header is cut off")
        try:
            header = json.loads(os.pread(self._handle, length, 8))
            header.pop("__metadata__", None)
            places = {}
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                places[name] = Place(tuple(entry["shape"]), DTYPES[entry["dtype"]], 8 + length + begin)
                if places[name].nbytes != end - begin:
                    raise self._damaged(f"{name} has {end - begin} bytes instead of {places[name].nbytes}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, HuggingFaceError):
                raise
            raise self._damaged(f"its header cannot be read: {error!r}") from error
        end = 8 + length
        for place in sorted(places.values(), key=lambda p: (p.start, p.nbytes)):
            if place.start != end:
                raise self._damaged("its tensors overlap or leave gaps")
            end += place.nbytes
        if end != size:
            raise self._damaged(f"it has {size} bytes instead of {end}")
        return places

    def _damaged(self, why: str) -> HuggingFaceError:
        return HuggingFaceError(f"{self.path} is damaged ({why}): download or write it again")


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A contiguous tensor's memory, to read from or write to."""
    if not tensor.numel():
        return memoryview(b"")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class Entry:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def header_bytes(entries: Iterable[Entry]) -> bytes:
    """Header of a file that holds the entries in this order; padded with spaces, so that the tensors start at a multiple of 8."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        header[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [end, end + entry.nbytes]}
        end += entry.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shards_of(groups: Sequence[Sequence[Entry]], max_bytes: int) -> list[list[Entry]]:
    """Entries dealt out to files: one that would grow beyond `max_bytes` is followed by another. Every file has an entry."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in (e for group in groups for e in group):
        if shards[-1] and size + entry.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards
