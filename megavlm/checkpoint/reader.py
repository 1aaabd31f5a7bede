"""Read a checkpoint's tensors in any process, without a model and without running code from it.

torch's `.metadata` is a pickle. It is read with an allow-list of the few types that a real one holds, and a checkpoint with
pickled objects among its tensors is refused, so nothing in the folder can run code.
"""

from __future__ import annotations

import io
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from megavlm.checkpoint.errors import CheckpointError, Unreadable
from megavlm.checkpoint.patience import MISSING, patiently

_CHECKPOINT = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    (_CHECKPOINT, "Metadata"),
    (_CHECKPOINT, "MetadataIndex"),
    (_CHECKPOINT, "StorageMeta"),
    (_CHECKPOINT, "BytesStorageMetadata"),
    (_CHECKPOINT, "ChunkStorageMetadata"),
    (_CHECKPOINT, "TensorProperties"),
    (_CHECKPOINT, "TensorStorageMetadata"),
    (_CHECKPOINT, "_MEM_FORMAT_ENCODING"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    # megatron-core adds the save plans of all ranks.
    ("torch.distributed.checkpoint.planner", "SavePlan"),
    ("torch.distributed.checkpoint.planner", "TensorWriteData"),
    ("torch.distributed.checkpoint.planner", "WriteItem"),
    ("torch.distributed.checkpoint.planner", "WriteItemType"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib._local", "PosixPath"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no checkpoint needs")


def read_metadata(path: Path) -> Metadata:
    """The index of a checkpoint's tensors.

    Raises:
        Unreadable: the disk or the file server does not give it.
        CheckpointError: the index is missing or damaged, or holds anything but tensors.
    """
    try:
        data = patiently((path / ".metadata").read_bytes, path / ".metadata")
    except MISSING:
        raise CheckpointError(f"{path} has no .metadata: it is not a checkpoint, or its save was interrupted") from None
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path}/.metadata is damaged or not a checkpoint's index: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}/.metadata is not a checkpoint's index")
    objects = [key for key, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)]
    if objects:
        raise CheckpointError(f"{path} holds pickled objects ({', '.join(objects[:3])}), which could run code: it was not written here")
    places = {str(getattr(place, "relative_path", place)) for place in metadata.storage_data.values()}
    outside = sorted(name for name in places if Path(name).name != name)
    if outside:
        raise CheckpointError(f"{path}: the index names files outside of the checkpoint: {', '.join(outside[:3])}")
    return metadata


class CheckpointReader:
    """Whole tensors of a checkpoint by key, whatever layout wrote it, in one process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata = metadata = read_metadata(self.path)
        self.entries: dict[str, TensorStorageMetadata] = dict(metadata.state_dict_metadata)  # type: ignore[arg-type]
        self._places: dict[MetadataIndex, _StorageInfo] = metadata.storage_data

    def dtype(self, key: str) -> torch.dtype:
        """Format of a tensor. Raises CheckpointError when there is none of that key."""
        return self._entry(key).properties.dtype

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of a tensor, padding included. Raises CheckpointError when there is none of that key."""
        return tuple(self._entry(key).size)

    def tensor(self, key: str) -> torch.Tensor:
        """One whole tensor, padding included. Raises CheckpointError when there is none of that key, or it is damaged."""
        entry = self._entry(key)
        whole = None
        for chunk in entry.chunks:
            piece = self.piece(key, chunk.offsets)
            if tuple(piece.shape) != tuple(chunk.sizes):
                raise CheckpointError(f"{self.path}: {key} is damaged: shape {tuple(piece.shape)} instead of {tuple(chunk.sizes)}")
            if tuple(chunk.sizes) == tuple(entry.size):
                return piece
            if whole is None:
                whole = torch.empty(entry.size, dtype=entry.properties.dtype)
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = piece
        if whole is None:
            raise CheckpointError(f"{self.path}: the index names no part of {key}")
        return whole

    def _entry(self, key: str) -> TensorStorageMetadata:
        if key not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {key}")
        return self.entries[key]

    def file(self, name: str) -> Path:
        """Path of a file that the index names."""
        return self.path / name

    def piece(self, key: str, offsets: torch.Size) -> torch.Tensor:
        """The chunk of a tensor that begins at `offsets`. Raises CheckpointError when it is missing, damaged or cannot be read."""
        place = self._places.get(MetadataIndex(key, offsets)) or self._places.get(MetadataIndex(key))
        if place is None or place.transform_descriptors:
            raise CheckpointError(f"{self.path}: the index does not say where {key} lies, or it is stored in a form that is not read here")
        file = self.path / place.relative_path

        def read() -> torch.Tensor:
            with _Slice(file, place.offset, place.length) as stream:
                found: torch.Tensor = torch.load(stream, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            return found

        try:
            return patiently(read, file)
        except Unreadable:
            raise
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(f"{file} is missing or damaged at {key}: {error}") from error


class _Slice(io.RawIOBase):
    """A stretch of a file, as a stream that reads straight into the memory it is given."""

    def __init__(self, file: Path, offset: int, length: int) -> None:
        self._handle, self._offset, self._length, self._at = os.open(file, os.O_RDONLY), offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max(self._length - self._at, 0)]
        count = os.preadv(self._handle, [view], self._offset + self._at) if view else 0
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()
