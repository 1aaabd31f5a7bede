"""Where an export's tensors come from: a checkpoint, or a model in memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model

from megavlm.checkpoint import folders, store
from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.models.weights import sharding_metadata


class TensorSource(Protocol):
    """Whole tensors by checkpoint key."""

    def __call__(self, key: str) -> torch.Tensor: ...

    def shape(self, key: str) -> tuple[int, ...]:
        """Padding included."""
        ...

    def dtype(self, key: str) -> torch.dtype: ...


class CheckpointSource:
    """Tensors of a checkpoint; modules that a later stage of its run did not hold come from the checkpoint that did last.

    Raises:
        HuggingFaceError: no stage so far has stored a module that is asked for.
        CheckpointError: a checkpoint is incomplete or damaged.
    """

    def __init__(self, checkpoint: str | Path) -> None:
        self.checkpoint = Path(checkpoint)
        self.homes = store.module_folders(checkpoint)
        self._readers: dict[Path, CheckpointReader] = {}
        self._hashing = ThreadPoolExecutor(1)
        self._checks: list[Future[None]] = []

    def __call__(self, key: str) -> torch.Tensor:
        return self._reader(key).tensor(key)

    def shape(self, key: str) -> tuple[int, ...]:
        return self._reader(key).shape(key)

    def dtype(self, key: str) -> torch.dtype:
        return self._reader(key).dtype(key)

    def identity(self) -> dict[str, str]:
        """Changes when any byte of the checkpoints does."""
        return {
            str(where.resolve()): folders.checksum(where / folders.MANIFEST)[folders.CHECKSUM] for where in sorted(set(self.homes.values()))
        }

    def check(self) -> None:
        """Wait until the checksums of all files read from are compared, which goes on beside the reading. Raises CheckpointError."""
        for found in self._checks:
            found.result()

    def close(self) -> None:
        self._hashing.shutdown(cancel_futures=True)

    def _reader(self, key: str) -> CheckpointReader:
        module = key.split(".", 1)[0]
        if module not in self.homes:
            raise HuggingFaceError(f"{self.checkpoint}: no stage so far has trained or stored the {module}: it has {', '.join(self.homes)}")
        where = self.homes[module]
        if where not in self._readers:
            folders.read_state(where)
            self._readers[where] = CheckpointReader(where)
            self._checks += [self._hashing.submit(folders.verify, where, [name]) for name in folders.manifest_files(where)]
        return self._readers[where]


class LiveSource:
    """Tensors of a model that a single rank holds whole (no tensor or pipeline parallelism)."""

    def __init__(self, chunks: Sequence[torch.nn.Module]) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        for chunk in chunks:
            bare: Any = unwrap_model(chunk)
            for base in nested_values(bare.sharded_state_dict(metadata=sharding_metadata(bare.ctx))):
                if isinstance(base, ShardedTensor) and base.global_shape != base.local_shape:
                    raise HuggingFaceError(f"{base.key} is split over ranks: save a checkpoint and export that")
                if isinstance(base, ShardedTensor | ShardedTensorFactory):
                    self._tensors[base.key] = base.data.detach()

    def __call__(self, key: str) -> torch.Tensor:
        if key not in self._tensors:
            raise HuggingFaceError(f"this model has no {key}: export takes a whole model on one rank")
        return self._tensors[key]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self(key).shape)

    def dtype(self, key: str) -> torch.dtype:
        return self(key).dtype


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` is, or the newest one of the run that it is. Raises CheckpointError."""
    path = Path(path)
    newest = folders.newest(path)
    if newest is None:
        folders.read_state(path)
    return newest or path
