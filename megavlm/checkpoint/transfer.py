"""From a checkpoint's files straight into a rank's pieces, whatever boxes they are stored in."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from megavlm.checkpoint.boxes import Box
from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.handles import Handles
from megavlm.checkpoint.patience import patiently
from megavlm.checkpoint.pieces import Piece
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.checkpoint.records import record_of

_THREADS = 4


class _Stored(NamedTuple):
    box: Box
    file: str
    start: int


class PieceReader:
    """Reads a checkpoint into pieces. One rank's; no rank waits for another."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.reader = CheckpointReader(path)
        self._places = self.reader.metadata.storage_data
        self._handles = Handles()

    def fill(self, pieces: Sequence[Piece]) -> None:
        """Write the checkpoint's values into the pieces' tensors; rows of vocabulary padding that it lacks become zero.

        Raises:
            Unreadable: the disk or the file server does not give the values.
            CheckpointError: a file is damaged, or the folder does not hold all of a piece (one node's part of a checkpoint).
        """
        try:
            with ThreadPoolExecutor(_THREADS) as threads:
                for _ in threads.map(self._fill, pieces):
                    pass
        finally:
            self._handles.close()

    @torch.no_grad()
    def _fill(self, piece: Piece) -> None:
        entry = self.reader.entries[piece.key]
        # Not all of it where rows of padding are asked for that the checkpoint lacks.
        there = piece.box.meet(Box((0,) * len(piece.shape), tuple(entry.size)))
        if there != piece.box:
            piece.tensor.zero_()
        if there is None:
            return
        covered: list[Box] = []
        for chunk in entry.chunks:
            stored = Box(tuple(chunk.offsets), tuple(chunk.sizes))
            common = there.meet(stored)
            # Copies of the same values may lie in one node's folder in different boxes.
            if common is not None and common not in covered:
                target = piece.tensor[common.inside(piece.box)]
                self._read(piece.key, entry.properties.dtype, stored, common, target)
                covered.append(common)
        if not _cover(there, covered):
            raise CheckpointError(f"{self.path} does not hold all of {piece.key}: it is a part of a checkpoint")

    def _read(self, key: str, dtype: torch.dtype, stored: Box, common: Box, target: torch.Tensor) -> None:
        place = self._places.get(MetadataIndex(key, torch.Size(stored.offset)))
        record = record_of(dtype, stored.sizes)
        if place is None or place.transform_descriptors or place.length != record.length or not self._is_plain(place, record.before):
            # Written by another program, or another release of torch: read as torch does.
            whole = self.reader.piece(key, torch.Size(stored.offset))
            if tuple(whole.shape) != stored.sizes:
                raise CheckpointError(f"{self.path}: {key} is damaged: shape {tuple(whole.shape)} instead of {stored.sizes}")
            target.copy_(whole[common.inside(stored)])
            return
        # The shortest stretch of the record that has all that is wanted.
        strides = [math.prod(stored.sizes[axis + 1 :]) for axis in range(len(stored.sizes))]
        first = sum((o - base) * s for o, base, s in zip(common.offset, stored.offset, strides, strict=True))
        count = 1 + sum((n - 1) * s for n, s in zip(common.sizes, strides, strict=True))
        at = place.offset + len(record.before) + first * dtype.itemsize
        if target.device.type == "cpu" and target.dtype == dtype and target.is_contiguous() and count == common.numel:
            self._read_bytes(place.relative_path, at, target)
            return
        stretch = torch.empty(count, dtype=dtype)
        self._read_bytes(place.relative_path, at, stretch)
        target.copy_(stretch.as_strided(common.sizes, strides))

    def _is_plain(self, place: object, before: bytes) -> bool:
        """Is the record what `records` lays out?"""
        found = bytearray(len(before))
        self._read_into(place.relative_path, place.offset, memoryview(found))  # type: ignore[attr-defined]
        return found == before

    def _read_bytes(self, file: str, at: int, target: torch.Tensor) -> None:
        self._read_into(file, at, target.view(-1).view(torch.uint8).numpy().data)

    def _read_into(self, name: str, at: int, view: memoryview) -> None:
        file = self.reader.file(name)

        def read() -> int:
            with self._handles.reading(file) as handle:
                return os.preadv(handle, [view], at)

        while view:
            count = patiently(read, file)
            if count == 0:
                raise CheckpointError(f"{file} ends too early")
            view, at = view[count:], at + count


def _cover(whole: Box, parts: Iterable[Box]) -> bool:
    """Is every element of `whole` in one of its parts?"""
    parts = list(parts)
    if sum(part.numel for part in parts) < whole.numel:
        return False
    if sum(part.numel for part in parts) == whole.numel and len(parts) == 1:
        return True
    seen = torch.zeros(whole.sizes, dtype=torch.bool)
    for part in parts:
        seen[part.inside(whole)] = True
    return bool(seen.all())
