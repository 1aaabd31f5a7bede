"""Weights as transformers writes them, one file or numbered shards with an index, written tensor by tensor.

Every shape is known beforehand, so a file's header is written first and no file is ever held in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from megavlm.checkpoint.ahead import made_ahead
from megavlm.checkpoint.hf.folder import INDEX, SINGLE
from megavlm.checkpoint.hf.tensor_files import Entry, header_bytes, raw_bytes, shards_of
from megavlm.checkpoint.journal import Journal
from megavlm.checkpoint.progress import progress_bar

_SYNC_BYTES = 500_000_000


@dataclass(frozen=True)
class Group:
    """Tensors that are made together, out of one of ours."""

    entries: tuple[Entry, ...]
    make: Callable[[], Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Weights:
    """Totals of `write_weights`."""

    num_tensors: int
    num_parameters: int
    dtype: str
    """torch's name; the widest where tensors differ."""


def write_weights(
    groups: Sequence[Group], folder: Path, max_shard_bytes: int, job: Any, *, sync_bytes: int = _SYNC_BYTES, label: str = "export"
) -> Weights:
    """Write the files and the index into `folder`; a job that was killed is gone on with until `journal.publish`.

    Args:
        groups: all tensors, in the order they are written.
        job: what is written, JSON: a folder of another job is emptied.
        sync_bytes: how much may have to be written again after a kill.
        label: of the progress bar.

    Raises:
        CheckpointError: another process is writing the folder.
        OSError: the disk is full or broken; what was written stays.
    """
    shards = shards_of([group.entries for group in groups], max_shard_bytes)
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    entries = [entry for shard in shards for entry in shard]
    total = sum(entry.nbytes for entry in entries)
    journal = Journal(folder, {"job": job, "files": names})
    done = int(journal.entries[-1]) if journal.entries else 0
    try:
        files = _Files(folder, names, shards, done)
        with progress_bar(label, total, sum(entry.nbytes for entry in entries[:done])) as bar:
            unsynced = 0
            ends = accumulate(len(group.entries) for group in groups)
            left = [(group, end) for group, end in zip(groups, ends, strict=True) if end > done]
            made = made_ahead(group.make for group, _ in left)
            for group, written in left:
                tensors = next(made)
                for entry, tensor in zip(group.entries, tensors, strict=True):
                    assert tuple(tensor.shape) == entry.shape and tensor.dtype == entry.dtype, entry
                    files.write(tensor.contiguous().cpu())
                    bar.update(entry.nbytes)
                    unsynced += entry.nbytes
                del tensors, tensor  # before the next are asked for
                if unsynced >= sync_bytes:
                    files.sync()
                    journal.add([written])
                    unsynced = 0
        files.close()
        journal.add([len(entries)])
        if len(shards) > 1:
            _write_index(folder, names, shards)
    finally:
        journal.close()
    widest = max({entry.dtype for entry in entries}, key=lambda d: d.itemsize)
    return Weights(len(entries), sum(prod(entry.shape) for entry in entries), str(widest).removeprefix("torch."))


class _Files:
    """The files one after another, from tensor number `done` on."""

    def __init__(self, folder: Path, names: Sequence[str], shards: Sequence[Sequence[Entry]], done: int) -> None:
        self._folder, self._names, self._shards = folder, names, shards
        self._shard = self._left = 0
        self._stream: BinaryIO | None = None
        while self._shard < len(shards) and done >= len(shards[self._shard]):
            done -= len(shards[self._shard])
            self._shard += 1
        if self._shard < len(shards):
            self._open(done)

    def write(self, tensor: torch.Tensor) -> None:
        if not self._left:
            self._next()
        assert self._stream is not None
        self._stream.write(raw_bytes(tensor))
        self._left -= 1

    def sync(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fdatasync(self._stream.fileno())

    def close(self) -> None:
        self.sync()
        if self._stream is not None:
            self._stream.close()

    def _next(self) -> None:
        self.close()
        self._shard += 1
        self._open(0)

    def _open(self, done: int) -> None:
        entries = self._shards[self._shard]
        header = header_bytes(entries)
        handle = os.open(self._folder / self._names[self._shard], os.O_RDWR | os.O_CREAT, 0o644)
        end = len(header) + sum(entry.nbytes for entry in entries[:done])
        if not done:
            os.ftruncate(handle, 0)
        self._stream = os.fdopen(handle, "r+b")
        if not done:
            self._stream.write(header)
        os.ftruncate(handle, end) if done else None
        self._stream.seek(end)
        self._left = len(entries) - done


def _write_index(folder: Path, names: Sequence[str], shards: Sequence[Sequence[Entry]]) -> None:
    places = {entry.name: name for name, shard in zip(names, shards, strict=True) for entry in shard}
    entries = [entry for shard in shards for entry in shard]
    index = {
        "metadata": {"total_parameters": sum(prod(e.shape) for e in entries), "total_size": sum(e.nbytes for e in entries)},
        "weight_map": dict(sorted(places.items())),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
