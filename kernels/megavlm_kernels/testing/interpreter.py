"""A process in which Triton's kernels run on the CPU, one program after the other, as numpy.

TRITON_INTERPRET must be set before Triton is imported: its own library functions become interpreted or compiled then. A test process
needs both kinds, so the interpreted one is a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

from megavlm_kernels.backend import INTERPRETER_VARIABLE

Result = TypeVar("Result")


class Interpreter:
    """One fresh process, started at the first call; `run` calls an importable function there."""

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_start)

    def run(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """`function(*args, **kwargs)` in the other process; raises what it raises. Tensors are copied there and back."""
        # Pickled here, so that tensors travel as bytes and not as shared memory that one side may outlive.
        result: Result = pickle.loads(self._pool.submit(_call, pickle.dumps((function, args, kwargs))).result())
        return result

    def close(self) -> None:
        self._pool.shutdown()


def _start() -> None:
    os.environ[INTERPRETER_VARIABLE] = "1"
    import torch

    torch.set_num_threads(1)


def _call(request: bytes) -> bytes:
    function, args, kwargs = pickle.loads(request)
    return pickle.dumps(function(*args, **kwargs))
