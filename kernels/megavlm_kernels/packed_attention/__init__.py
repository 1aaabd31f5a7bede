"""Block-diagonal attention over packed sequences: segments see themselves and nothing else.

`selection` imports no torch, so that a plan can ask which backends could serve a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megavlm_kernels.packed_attention.selection import BACKENDS, BackendError, Call, Choice, Machine, choose, unmet_need

if TYPE_CHECKING:
    from megavlm_kernels.packed_attention.machine import call_of, machine_of
    from megavlm_kernels.packed_attention.op import packed_attention
    from megavlm_kernels.packed_attention.sdpa import capped_attention
    from megavlm_kernels.packed_attention.segments import Segments

__all__ = [
    "BACKENDS",
    "BackendError",
    "Call",
    "Choice",
    "Machine",
    "Segments",
    "call_of",
    "capped_attention",
    "choose",
    "machine_of",
    "packed_attention",
    "unmet_need",
]

_NEEDS_TORCH = {"call_of": "machine", "machine_of": "machine", "packed_attention": "op", "capped_attention": "sdpa", "Segments": "segments"}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_NEEDS_TORCH[name]}"), name)
