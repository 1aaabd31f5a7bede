"""megatron-core is imported in half the time where there is no GPU.

At import it wraps its fused functions in `torch.compile`, which imports all of Inductor: 2.5 of 9 seconds of every command on a CPU, where
nothing calls these functions compiled, nor could on a machine without a C++ compiler.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class PlainFunctions(MetaPathFinder):
    """Leaves the functions of megatron-core as they are written, where torch sees no GPU. Steps aside after the first import of it."""

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "megatron.core":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
        return spec


class _Loader:
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        # Not is_available(): it would start CUDA in a process that is yet to fork.
        if torch.cuda.device_count():
            self._loader.exec_module(module)
            return
        compile = torch.compile
        torch.compile = _as_written  # type: ignore[assignment]
        try:
            self._loader.exec_module(module)
        finally:
            torch.compile = compile


def _as_written(function: Any = None, **_: Any) -> Any:
    return _as_written if function is None else function


def install() -> None:
    """Before anything imports megatron-core. Idempotent."""
    if "megatron.core" not in sys.modules and not any(isinstance(finder, PlainFunctions) for finder in sys.meta_path):
        sys.meta_path.insert(0, PlainFunctions())
