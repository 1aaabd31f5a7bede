"""Write a checkpoint tensor by tensor in one process, without a model: what `store.load` reads into any layout.

The files are those of torch.distributed.checkpoint as megatron-core writes them. No more than the tensor that is being
written is held in memory here, and a job that was killed goes on where it was (`journal`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch

import megavlm
from megavlm.checkpoint import folders
from megavlm.checkpoint.boxes import Box
from megavlm.checkpoint.index import Placed, index_files
from megavlm.checkpoint.journal import JOURNAL, Journal, publish
from megavlm.checkpoint.records import without_crc

_FILE_BYTES = 2_000_000_000
_SYNC_BYTES = 500_000_000


class CheckpointWriter:
    """An unfinished checkpoint.

    Args:
        path: its name once it is whole; until then its files lie in `path` + ".tmp".
        job: what is written, JSON; a `.tmp` folder of the same job is gone on with, another one is emptied.
        file_bytes: a file of tensors that has reached this is followed by another.
        sync_bytes: how much may have to be written again after a kill.

    Raises:
        CheckpointError: another process is writing it.
        OSError: the disk is full or broken. What was written stays, and the same call goes on from there.
    """

    def __init__(self, path: Path, job: Any, *, file_bytes: int = _FILE_BYTES, sync_bytes: int = _SYNC_BYTES) -> None:
        self.path, self.folder = path, path.with_name(path.name + folders.UNFINISHED)
        self._file_bytes, self._sync_bytes = file_bytes, sync_bytes
        self._journal = Journal(self.folder, job)
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0
        self._stream: BinaryIO | None = None
        self._hashing = ThreadPoolExecutor(1)
        self._sums: dict[str, Future[dict[str, Any]]] = {}
        last = self._journal.entries[-1] if self._journal.entries else None
        self._number = 0 if last is None else int(last["file"].split("_")[-1].split(".")[0])
        self._end = 0 if last is None else last["offset"] + last["length"]
        if last is not None:
            os.truncate(self.folder / self._file, self._end)  # what a killed start wrote beyond the journal
        for file in sorted({e["file"] for e in self._journal.entries} - {self._file}):
            self._hash(file)

    @property
    def done(self) -> set[str]:
        """Keys that are written already."""
        return {entry["key"] for entry in self._journal.entries}

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Write one whole tensor."""
        if tensor.untyped_storage().nbytes() != tensor.nbytes or not tensor.is_contiguous():
            tensor = tensor.clone(memory_format=torch.contiguous_format)  # torch.save writes the storage, not the view
        if self._end >= self._file_bytes:
            self._close_file()
            self._number, self._end = self._number + 1, 0
        stream = self._opened()
        with without_crc():
            try:
                torch.save(tensor.detach(), stream)
            except RuntimeError as error:
                # On its way out torch's writer finds its file too short and hides why.
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        length = stream.tell() - self._end
        dtype = str(tensor.dtype).removeprefix("torch.")
        entry = {"key": key, "file": self._file, "offset": self._end, "length": length, "shape": list(tensor.shape), "dtype": dtype}
        self._pending.append(entry)
        self._end += length
        self._pending_bytes += length
        if self._pending_bytes >= self._sync_bytes:
            self._sync()

    def finish(self, state: dict[str, Any], more: Callable[[Path], None] | None = None) -> None:
        """Write indexes, state and manifest, and give the folder its name. `more` adds files and folders of its own."""
        self._close_file()
        entries = self._journal.entries
        for name, data in index_files([_placed(entry) for entry in entries]).items():
            (self.folder / name).write_bytes(data)
        held = sorted({entry["key"].split(".", 1)[0] for entry in entries})
        everything = {
            "format": folders.FORMAT,
            "megavlm_version": megavlm.__version__,
            "modules": dict.fromkeys(held, self.path.name),
            **state,
            "held": held,
            "has_optimizer": False,
            "optimizer_step": 0,
        }
        names = sorted(p.name for p in self.folder.iterdir() if p.is_file() and p.name not in (JOURNAL, folders.STATE, folders.MANIFEST))
        files = {name: self._sums[name].result() if name in self._sums else folders.checksum(self.folder / name) for name in names}
        if more is not None:
            more(self.folder)
        folders.write_json(self.folder / folders.STATE, everything)
        folders.write_json(self.folder / folders.MANIFEST, {"files": files})
        self._hashing.shutdown()
        publish(self.folder, self.path)
        self._journal.close()

    def leave(self) -> None:
        """Stop before the end; what is written stays for the next start."""
        if self._stream is not None:
            self._stream.close()
        self._hashing.shutdown(cancel_futures=True)
        self._journal.close()

    @property
    def _file(self) -> str:
        return f"__0_{self._number}.distcp"

    def _opened(self) -> BinaryIO:
        if self._stream is None:
            handle = os.open(self.folder / self._file, os.O_RDWR | os.O_CREAT, 0o644)
            os.ftruncate(handle, self._end)  # a killed start may have begun this file, too
            self._stream = os.fdopen(handle, "r+b")
            self._stream.seek(self._end)
        return self._stream

    def _sync(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fdatasync(self._stream.fileno())
        self._journal.add(self._pending)
        self._pending, self._pending_bytes = [], 0

    def _close_file(self) -> None:
        self._sync()
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._file not in self._sums and (self.folder / self._file).is_file():
            self._hash(self._file)

    def _hash(self, file: str) -> None:
        """Beside the writing of the next file, while its bytes are still in the system's cache."""
        self._sums[file] = self._hashing.submit(folders.checksum, self.folder / file)


def _placed(entry: dict[str, Any]) -> Placed:
    shape = tuple(entry["shape"])
    box = Box((0,) * len(shape), shape)
    return Placed(entry["key"], getattr(torch, entry["dtype"]), shape, box, entry["file"], entry["offset"], entry["length"])
