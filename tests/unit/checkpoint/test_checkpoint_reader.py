"""Reading a checkpoint must never run code from it."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.reader import CheckpointReader, read_metadata


def test_reads_what_torch_wrote(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(5, 3), "b": torch.arange(4, dtype=torch.bfloat16)}
    save(dict(tensors), storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    reader = CheckpointReader(tmp_path)
    for key, tensor in tensors.items():
        assert reader.dtype(key) == tensor.dtype
        assert torch.equal(reader.tensor(key), tensor)
    with pytest.raises(CheckpointError, match="no tensor nothing"):
        reader.tensor("nothing")


def test_code_in_the_index_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="posix.mkdir, which no checkpoint needs"):
        read_metadata(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_pickled_objects_among_the_tensors_are_refused(tmp_path: Path) -> None:
    save({"a": torch.zeros(1), "evil": {1, 2}}, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    with pytest.raises(CheckpointError, match="holds pickled objects .*evil"):
        read_metadata(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", pickle.dumps([1])])
def test_a_damaged_index_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(CheckpointError, match="index"):
        read_metadata(tmp_path)


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no \.metadata"):
        read_metadata(tmp_path)
