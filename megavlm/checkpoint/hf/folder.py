"""The weights of a Hugging Face folder: one safetensors file or several with an index, read one tensor at a time, never pickles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from megavlm.checkpoint.errors import HuggingFaceError, some

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class WeightFolder:
    """Tensors of a folder by the names that transformers 5 writes; files stay open (memory-mapped) until `close`.

    `disk_name` maps a stored name to that name, or to None for what is no weight (`Family.disk_name`).

    Raises:
        HuggingFaceError: no safetensors, a damaged file, a file or tensor that the index names and the folder lacks.
    """

    def __init__(self, folder: str | Path, disk_name: Callable[[str], str | None]) -> None:
        self.folder = Path(folder)
        self._files: dict[str, Any] = {}
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
        return self._open(file).get_tensor(stored)  # type: ignore[no-any-return]

    def rows(self, name: str, first: int, last: int) -> torch.Tensor:
        """Rows first .. last of a tensor; nothing else is read."""
        file, stored = self._places[name]
        return self._open(file).get_slice(stored)[first:last]  # type: ignore[no-any-return]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        file, stored = self._places[name]
        return tuple(self._open(file).get_slice(stored).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Number format of a tensor, without reading it."""
        file, stored = self._places[name]
        piece = self._open(file).get_slice(stored)
        # An empty piece: a slice knows its format only by safetensors' own names.
        return piece[:0].dtype if piece.get_shape() else self.tensor(name).dtype

    def close(self) -> None:
        """Let go of the files."""
        self._files.clear()

    def __enter__(self) -> WeightFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _contents(self) -> dict[str, str]:
        """Stored name -> file."""
        if (self.folder / INDEX).is_file():
            try:
                contents: dict[str, str] = json.loads((self.folder / INDEX).read_text())["weight_map"]
            except (json.JSONDecodeError, KeyError, UnicodeDecodeError) as error:
                raise HuggingFaceError(f"{self.folder / INDEX} is damaged: {error!r}") from error
            for file in sorted(set(contents.values())):
                stored = set(self._open(file).keys())
                missing = sorted(n for n, f in contents.items() if f == file and n not in stored)
                if missing:
                    raise HuggingFaceError(f"{self.folder / file} lacks {some(missing)}, which {INDEX} says it holds")
            return contents
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        pickles = sorted(p.name for pattern in ("*.bin", "*.pth", "*.pt") for p in self.folder.glob(pattern))
        hint = f"; {some(pickles)} are pickles, which can run code: save the model with safe_serialization" if pickles else ""
        raise HuggingFaceError(f"{self.folder} has neither {SINGLE} nor {INDEX}{hint}")

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._files:
            path = self.folder / file
            if path.parent != self.folder or not path.is_file():
                raise HuggingFaceError(f"{path} is missing, though {INDEX} names it: the download is incomplete")
            try:
                self._files[file] = safe_open(str(path), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise HuggingFaceError(f"{path} is damaged ({error}): download or write it again") from error
        return self._files[file]
