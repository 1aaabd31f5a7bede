"""megatron-core's loading of a checkpoint's shards, with nothing of it unpickled but tensors and the index's few types.

Left to itself it unpickles the index (`.metadata`) without any check, reads `common.pt` with whatever `torch.load` is told by the
environment (TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD), and lets `metadata.json` choose who reads. Here the index goes through
`reader.read_metadata`, which also refuses objects among the tensors, and the other two are not read: what they could say is known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load
from megatron.core.dist_checkpointing.strategies import torch as mcore_torch
from megatron.core.dist_checkpointing.strategies.base import LoadCommonStrategy
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.reader import read_metadata


def load_sharded(tensors: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """Fill sharded tensors from a checkpoint; every rank calls this.

    Raises:
        CheckpointError: the index is damaged, or holds anything but tensors.
    """
    # megatron-core finds its reader by these names, at every call.
    mcore_torch.FileSystemReader = mcore_torch.CachedMetadataFileSystemReader = _GuardedReader
    strategies = mcore_torch.TorchDistLoadShardedStrategy(), _NothingInCommon()
    try:
        loaded: dict[Any, Any] = load(tensors, str(path), *strategies, validate_access_integrity=False)
    except CheckpointException as error:  # its text is the tracebacks of all ranks
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        raise CheckpointError(
            f"{path} cannot be read on rank {rank}: {type(cause).__name__}: {str(cause).partition(chr(10))[0]}"
        ) from error
    return loaded


class _GuardedReader(FileSystemReader):
    """torch's, with the index read by an allow-list, once."""

    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._index is None:
            self._index = read_metadata(Path(self.path))
            self._index.storage_meta = self._index.storage_meta or StorageMeta()
            self._index.storage_meta.load_id = self.load_id
        return self._index


class _NothingInCommon(LoadCommonStrategy):
    """Objects that are no tensors lie in state.json: there are none to load here."""

    def check_backend_compatibility(self, loaded_backend: Any) -> None: ...

    def check_version_compatibility(self, loaded_version: Any) -> None: ...

    def load_common(self, checkpoint_dir: Any) -> dict[str, Any]:
        return {}

    def load_sharded_objects(self, sharded_objects_state_dict: Any, checkpoint_dir: Any) -> Any:
        raise CheckpointError(f"{checkpoint_dir}: pickled objects are not loaded")
