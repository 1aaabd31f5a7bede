"""What `megavlm doctor` looks for: the parts that megavlm can use, and what a run loses without each."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

Status = Literal["ok", "missing", "broken"]


@dataclass(frozen=True)
class Part:
    """A package, how to find it, and why it matters."""

    name: str
    module: str
    distributions: tuple[str, ...]
    """Packages that may bring the module, tried in order for its version."""
    required: bool
    without: str
    """What is lost, or what is used instead, when it is missing."""
    detail: Callable[[ModuleType], str] | None = None


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    status: Status
    version: str
    detail: str
    without: str
    required: bool


def _cuda_detail(torch: Any) -> str:
    if not torch.cuda.is_available():
        return "no GPU can be used" + ("" if torch.version.cuda else " (this torch is a CPU build)")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    counted = ", ".join(f"{names.count(n)} x {n}" for n in dict.fromkeys(names))
    return f"{counted}; CUDA {torch.version.cuda}; NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"


def _torch_detail(torch: Any) -> str:
    return f"{torch.get_num_threads()} CPU threads; gloo {'yes' if torch.distributed.is_gloo_available() else 'no'}"


PARTS = [
    Part("torch", "torch", ("torch",), True, "nothing trains", _torch_detail),
    Part("megatron-core", "megatron.core", ("megatron-core",), True, "nothing trains: it is the engine"),
    Part("transformers", "transformers", ("transformers",), True, "no import or export of Hugging Face models, no Hugging Face tokenizers"),
    Part("safetensors", "safetensors", ("safetensors",), True, "no import or export of Hugging Face models"),
    Part("sentencepiece", "sentencepiece", ("sentencepiece",), True, "no SentencePiece tokenizers (*.model), no quickstart"),
    Part("psutil", "psutil", ("psutil",), True, "megatron-core hangs while saving a checkpoint"),
    Part("mlflow", "mlflow", ("mlflow",), True, "no MLflow run; metrics.jsonl is still written"),
    Part(
        "Transformer Engine", "transformer_engine.pytorch", ("transformer-engine",), False, "no FP8 and no fused layers: torch's are used"
    ),
    Part("Apex", "apex", ("apex",), False, "no fused gradient accumulation and optimizer kernels; torch's AdamW is used"),
    Part("flash-attn", "flash_attn", ("flash-attn",), False, "packed attention without Transformer Engine is slower: torch's varlen"),
    Part("Triton", "triton", ("triton",), False, "kernels run as their torch reference"),
    Part("DALI", "nvidia.dali", ("nvidia-dali-cuda130", "nvidia-dali-cuda120"), False, "no DALI pipelines"),
    Part("nvImageCodec", "nvidia.nvimgcodec", ("nvidia-nvimgcodec-cu13", "nvidia-nvimgcodec-cu12"), False, "Pillow decodes, on the CPU"),
    Part("bitsandbytes", "bitsandbytes", ("bitsandbytes",), False, "no 4-bit weights (QLoRA)"),
]


def examine(part: Part) -> Finding:
    """Imports a part, since an installed package that does not load is worse than a missing one."""
    try:
        found = importlib.util.find_spec(part.module) is not None
    except (ImportError, ValueError):  # a parent package is missing
        found = False
    if not found:
        return Finding(part.name, "missing", "", "", part.without, part.required)
    version = _version(part)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = importlib.import_module(part.module)
            detail = part.detail(module) if part.detail else ""
    except Exception as error:  # whatever a broken binary raises: that is what is to be reported
        problem = str(error).strip().splitlines() or [""]
        return Finding(part.name, "broken", version, f"{type(error).__name__}: {problem[0]}", part.without, part.required)
    return Finding(part.name, "ok", version or str(getattr(module, "__version__", "")), detail, part.without, part.required)


def examine_cuda() -> Finding:
    """GPUs as torch sees them."""
    without = "training runs on the CPU over gloo: right for tests and the quickstart"
    try:
        torch = importlib.import_module("torch")
        detail = _cuda_detail(torch)
        status: Status = "ok" if torch.cuda.is_available() else "missing"
        return Finding("CUDA", status, torch.version.cuda or "", detail, without, False)
    except Exception as error:
        return Finding("CUDA", "broken", "", f"{type(error).__name__}: {error}", without, False)


def machine() -> dict[str, str]:
    """Python and the machine, in words."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"python": platform.python_version(), "executable": sys.executable, "system": platform.platform(), "cores": str(cores)}
    try:
        found["memory_gib"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f}"
    except (ValueError, OSError):
        found["memory_gib"] = "unknown"
    return found


def _version(part: Part) -> str:
    for name in part.distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""
