"""Whether an op runs its Triton kernels or plain torch, decided from what the process and the tensors are."""

from __future__ import annotations

import os
from functools import lru_cache
from importlib.util import find_spec

import torch

INTERPRETER_VARIABLE = "TRITON_INTERPRET"


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """True when Triton is installed (it need not be able to run: that takes a GPU, or its interpreter)."""
    return find_spec("triton") is not None


@lru_cache(maxsize=1)
def interprets() -> bool:
    """True when Triton's kernels are interpreted on the CPU in this process; the variable counts when Triton is imported."""
    return has_triton() and os.environ.get(INTERPRETER_VARIABLE, "").lower() in ("1", "true", "on", "yes", "y")


def uses_triton(x: torch.Tensor) -> bool:
    """True when kernels run for `x`: on CUDA, or anywhere under the interpreter.

    Never in fp64, which they do not accumulate in; nor in what torch.compile traces, where plain torch is fused with what is around it.
    """
    if torch.compiler.is_compiling():
        return False
    runs = has_triton() if x.is_cuda else interprets() and x.device.type == "cpu"
    return runs and x.dtype != torch.float64
