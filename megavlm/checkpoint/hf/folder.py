"""The weights of a Hugging Face folder: one safetensors file or several with an index, read one tensor at a time, never pickles."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import torch

from megavlm.checkpoint.errors import HuggingFaceError, some
from megavlm.checkpoint.hf.tensor_files import TensorFile

log = logging.getLogger(__name__)
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt", "*.pkl")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFolder:
    """Tensors of a folder by the names that transformers 5 writes; files stay open until `close`.

    `disk_name` maps a stored name to that name, or to None for what is no weight (`Family.disk_name`).

    Raises:
        HuggingFaceError: no safetensors, a damaged file, a file or tensor that the index names and the folder lacks.
    """

    def __init__(self, folder: str | Path, disk_name: Callable[[str], str | None]) -> None:
        self.folder = Path(folder)
        self._files: dict[str, TensorFile] = {}
        self._places: dict[str, tuple[str, str]] = {}
        for stored, file in self._contents().items():
            name = disk_name(stored)
            if name is None:
                continue
            if name in self._places:
                raise HuggingFaceError(f"{folder} holds {name} twice, as {stored} and as {self._places[name][1]}")
            self._places[name] = (file, stored)

    @property
    def names(self) -> set[str]:
        """Every weight of the folder, by the name that transformers 5 writes."""
        return set(self._places)

    def tensor(self, name: str) -> torch.Tensor:
        """One whole tensor."""
        file, stored = self._places[name]
        return self._open(file).read(stored)

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows first .. last of a tensor; nothing else is read."""
        file, stored = self._places[name]
        return self._open(file).read(stored, first, last)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        file, stored = self._places[name]
        return self._open(file).places[stored].shape

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor, without reading it."""
        file, stored = self._places[name]
        return self._open(file).places[stored].dtype

    def file(self, name: str) -> str:
        """Name of the file that holds a tensor."""
        return self._places[name][0]

    def files(self) -> dict[str, tuple[int, int]]:
        """Each file's (bytes, time of change): another download of the same name is told apart."""
        found = {name: (self.folder / name).stat() for name in sorted(self._files)}
        return {name: (entry.st_size, entry.st_mtime_ns) for name, entry in found.items()}

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _contents(self) -> dict[str, str]:
        """Stored name -> file."""
        if not self.folder.is_dir():
            raise HuggingFaceError(f"{self.folder}: there is no such folder")
        if (self.folder / SINGLE).is_file():
            if (self.folder / INDEX).is_file():
                log.warning(
                    "%s holds %s and %s: the first is read, as transformers does; remove the one that is old", self.folder, SINGLE, INDEX
                )
            return dict.fromkeys(self._open(SINGLE).places, SINGLE)
        if (self.folder / INDEX).is_file():
            try:
                contents: dict[str, str] = json.loads((self.folder / INDEX).read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError, TypeError) as error:
                raise HuggingFaceError(f"{self.folder / INDEX} is damaged: {error!r}") from error
            by_file: dict[str, list[str]] = {}
            for name, file in contents.items():
                by_file.setdefault(file, []).append(name)
            for file, names in sorted(by_file.items()):
                missing = sorted(set(names) - self._open(file).places.keys())
                if missing:
                    raise HuggingFaceError(f"{self.folder / file} lacks {some(missing)}, which {INDEX} says it holds")
            return contents
        pickles = sorted(p.name for pattern in _PICKLES for p in self.folder.glob(pattern))
        hint = (
            f"; {some(pickles)}: pickles, which can run code, are not read: load it elsewhere, and save it as safetensors"
            if pickles
            else ""
        )
        raise HuggingFaceError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}")

    def _open(self, file: str) -> TensorFile:
        if file not in self._files:
            path = self.folder / file
            if path.parent != self.folder or not path.is_file():
                raise HuggingFaceError(f"{path} is missing, though {INDEX} names it: the download is incomplete")
            self._files[file] = TensorFile(path)
        return self._files[file]
