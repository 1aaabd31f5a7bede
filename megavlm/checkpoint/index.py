"""The index of a checkpoint's tensors, in the files that torch.distributed.checkpoint and megatron-core look for."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megavlm.checkpoint.boxes import Box

_CONFIG = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", "common_backend_version": 1}


class Placed(NamedTuple):
    """A box of a tensor, and where its record lies."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    file: str
    start: int
    length: int


def index_files(placed: Iterable[Placed]) -> dict[str, bytes]:
    """File name -> contents of the files beside the shards."""
    tensors: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for entry in placed:
        if entry.key not in tensors:
            tensors[entry.key] = TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(entry.shape), [])
        offset = torch.Size(entry.box.offset)
        tensors[entry.key].chunks.append(ChunkStorageMetadata(offset, torch.Size(entry.box.sizes)))
        storage[MetadataIndex(entry.key, offset)] = _StorageInfo(entry.file, entry.start, entry.length)
    index = Metadata(state_dict_metadata=tensors, planner_data=None, storage_data=storage, storage_meta=StorageMeta())
    nothing = io.BytesIO()
    torch.save({}, nothing)
    return {".metadata": pickle.dumps(index), "common.pt": nothing.getvalue(), "metadata.json": json.dumps(_CONFIG).encode()}
