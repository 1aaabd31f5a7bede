"""What this machine has for packed attention."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import warnings
from functools import lru_cache

import torch

from megavlm_kernels.packed_attention.segments import Segments
from megavlm_kernels.packed_attention.selection import Call, Machine

DTYPE_NAMES = {torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def call_of(query: torch.Tensor, segments: Segments, window: int | None, softcap: float | None) -> Call:
    """What attention of this query needs. A window that no segment fills is none."""
    windowed = window is not None and segments.longest_key > window
    return Call(DTYPE_NAMES[query.dtype], query.shape[-1], windowed, softcap is not None, bool(segments.masked))


@lru_cache(maxsize=16)
def machine_of(device_type: str, index: int | None = None) -> Machine:
    """What is there on a kind of device. Packages are imported: one that is installed and does not load is not there."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return Machine(device_type if device_type != "cuda" else "cpu", varlen=_loads("torch.nn.attention.varlen"))
    return Machine(
        "cuda",
        torch.cuda.get_device_capability(index),
        varlen=_loads("torch.nn.attention.varlen"),
        flash_attn_2=_version("flash_attn", "flash-attn", "flash_attn_varlen_func"),
        flash_attn_3=_loads("flash_attn_interface", "flash_attn_varlen_func"),
        transformer_engine=_version("transformer_engine.pytorch", "transformer-engine", "DotProductAttention"),
    )


def _loads(module: str, name: str | None = None) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = importlib.import_module(module)
    except Exception:  # whatever a binary for another torch raises: it is of no use
        return False
    return name is None or hasattr(found, name)


def _version(module: str, distribution: str, name: str) -> tuple[int, ...] | None:
    if not _loads(module, name):
        return None
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        version = str(getattr(importlib.import_module(module.partition(".")[0]), "__version__", "0"))
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3])
