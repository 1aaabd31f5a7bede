"""What a run ran on: versions, hardware, code state. For environment.json, so that a result can be explained later.

Nothing here names a machine, a person or a secret: of the environment only the variables on a list are read.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

PACKAGES = (
    "torch",
    "megatron-core",
    "transformer-engine",
    "apex",
    "flash-attn",
    "triton",
    "transformers",
    "tokenizers",
    "sentencepiece",
    "safetensors",
    "numpy",
    "pillow",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "nvidia-nvimgcodec-cu13",
    "nvidia-nvimgcodec-cu12",
    "bitsandbytes",
    "mlflow",
    "pydantic",
    "omegaconf",
)
"""Distributions whose versions explain a difference between two runs."""

ENVIRONMENT_NAMES = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_NTASKS",
    "SLURM_RESTART_COUNT",
    "SLURM_CPUS_PER_TASK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_MAX_CONNECTIONS",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
ENVIRONMENT_PREFIXES = ("NCCL_", "TORCH_NCCL_", "NVTE_")
# NCCL_COMM_ID is an address; the words are a second fence should a prefix ever match more than it does today.
_NEVER = ("COMM_ID", "HOSTID", "TOKEN", "SECRET", "PASSWORD", "KEY", "CREDENTIAL")


def environment_report() -> dict[str, Any]:
    """Versions, CPU, GPUs, code state and chosen environment variables, as JSON can hold them. Under a second.

    Keys: time_utc, python, platform, packages {name: version, None when absent}, cpu {model, cores, memory_bytes},
    cuda {version, cudnn} and gpus [{name, memory_bytes, capability}] as torch sees them,
    attention {chosen, refused {backend: why}}, code {version, git_commit, git_dirty}, environment {name: value}.
    """
    return {
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "python": sys.version.split()[0],
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: package_version(name) for name in PACKAGES},
        "cpu": _cpu(),
        **_cuda(),
        "attention": _attention(),
        "code": {"version": package_version("megavlm"), **_git_state(Path(__file__).resolve().parent)},
        "environment": chosen_environment(os.environ),
    }


def package_version(name: str) -> str | None:
    """Installed version of a distribution, read without importing it; None when absent."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def chosen_environment(environment: Any) -> dict[str, str]:
    """The variables of `environment` that are on the list."""
    return {
        name: value
        for name, value in sorted(environment.items())
        if (name in ENVIRONMENT_NAMES or name.startswith(ENVIRONMENT_PREFIXES)) and not any(word in name for word in _NEVER)
    }


def _cpu() -> dict[str, Any]:
    model = platform.processor() or None
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), model)
    except OSError:
        pass  # not Linux: the short name of platform.processor() has to do
    allowed = getattr(os, "sched_getaffinity", None)
    cores = len(allowed(0)) if allowed else os.cpu_count()
    try:
        memory_bytes: int | None = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        memory_bytes = None
    return {"model": model, "cores": cores, "memory_bytes": memory_bytes}


def _cuda() -> dict[str, Any]:
    """What torch sees; imported here because the report is also wanted where torch is broken or absent."""
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"cuda": {"error": f"torch cannot be imported: {type(error).__name__}"}, "gpus": []}
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(i)
            gpus.append({"name": found.name, "memory_bytes": found.total_memory, "capability": f"{found.major}.{found.minor}"})
    cudnn = torch.backends.cudnn.version()
    return {"cuda": {"version": torch.version.cuda, "cudnn": cudnn}, "gpus": gpus}


def _attention() -> dict[str, Any]:
    """The backend of packed attention that a plain bf16 call takes here, and why not the others."""
    try:
        from megavlm_kernels.packed_attention import Call, choose, machine_of

        choice = choose(Call("bf16", 128), machine_of("cuda"))
    except (ImportError, OSError) as error:
        return {"error": f"torch cannot be imported: {type(error).__name__}"}
    return {"chosen": choice.backend, "refused": dict(choice.refused)}


def _git_state(folder: Path) -> dict[str, Any]:
    """Commit of the checkout that this package is tracked in; None when it is an installed copy."""
    tracked = _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
    if tracked is None:
        return {"git_commit": None, "git_dirty": None}
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"git_commit": _git(folder, "rev-parse", "HEAD"), "git_dirty": None if changes is None else bool(changes)}


def _git(folder: Path, *arguments: str) -> str | None:
    """Output of git, or None when there is no git, no repository, or no answer (a slow network disk) in 2 s."""
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
