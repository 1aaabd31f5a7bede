"""Read a checkpoint's tensors in any process, without a model and without running code from it.

torch's `.metadata` is a pickle. It is read with an allow-list of the few types that a real one holds, and a checkpoint with
pickled objects among its tensors is refused, so nothing in the folder can run code.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megavlm.checkpoint.errors import CheckpointError

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
        CheckpointError: the index is missing or damaged, or holds anything but tensors.
    """
    try:
        with open(path / ".metadata", "rb") as stream:
            metadata = _Unpickler(stream).load()
    except FileNotFoundError:
        raise CheckpointError(f"{path} has no .metadata: it is not a checkpoint, or its save was interrupted") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        raise CheckpointError(f"{path}/.metadata is damaged or not a checkpoint's index: {error}") from error
    if not isinstance(metadata, Metadata):
        raise CheckpointError(f"{path}/.metadata is not a checkpoint's index")
    objects = [key for key, entry in metadata.state_dict_metadata.items() if not isinstance(entry, TensorStorageMetadata)]
    if objects:
        raise CheckpointError(f"{path} holds pickled objects ({', '.join(objects[:3])}), which could run code: it was not written here")
    return metadata


class _Reader(FileSystemReader):
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


class CheckpointReader:
    """Whole tensors of a checkpoint by key, whatever layout wrote it, in one process."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.entries: dict[str, TensorStorageMetadata] = dict(read_metadata(self.path).state_dict_metadata)  # type: ignore[arg-type]

    def dtype(self, key: str) -> torch.dtype:
        """Format of a tensor."""
        return self.entries[key].properties.dtype

    def tensor(self, key: str) -> torch.Tensor:
        """One whole tensor, padding included. Raises CheckpointError when there is none of that key."""
        if key not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {key}")
        from torch.distributed.checkpoint.state_dict_loader import load

        entry = self.entries[key]
        box = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is what is meant
            load(box, storage_reader=_Reader(self.path), no_dist=True)
        return box[key]
