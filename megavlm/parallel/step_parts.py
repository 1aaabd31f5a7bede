"""A step's parts where megatron-core and torch do the work: backward passes, collectives, pipeline messages; and stamps of a GPU.

What runs here is wrapped once a process, by names that megatron-core looks up when it calls. A wrapper costs a comparison while no
step is timed. Collectives that torch's own sharding (parallel.zero 2 and 3) starts are not seen: their wait counts to the part around.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from megavlm.tracking.timers import part, running_clock

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "broadcast",
    "barrier",
)


class CudaStamps:
    """Events in the current stream. A collective that the stream waits for is in the time between two of them."""

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: Any, second: Any) -> float:
        return float(first.elapsed_time(second)) / 1e3

    def is_reached(self, stamp: Any) -> bool:
        return bool(stamp.query())


def turn_on_gradient(tensor: Any, name: str, microbatch: int | None = None) -> None:
    """When the gradient of `tensor` is there, the backward pass goes on as the part `name`."""
    if running_clock() is None or not isinstance(tensor, torch.Tensor) or not tensor.requires_grad:
        return

    def turn(_: torch.Tensor) -> None:
        if (clock := running_clock()) is not None:
            clock.turn(name, microbatch)

    tensor.register_hook(turn)


@functools.cache
def wrap_collectives() -> None:
    """Time what megatron-core does, from now on. Idempotent."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.pipeline_parallel import p2p_communication, schedules
    from megatron.core.tensor_parallel import layers, mappings

    schedules.backward_step = _timed(schedules.backward_step, "language_backward")
    messages: Any = p2p_communication.P2PCommunicator
    messages._communicate = _timed(messages._communicate, "pipeline")
    buckets: Any = param_and_grad_buffer._ParamAndGradBucketGroup
    for method in ("start_param_sync", "finish_param_sync", "start_grad_sync", "finish_grad_sync"):
        setattr(buckets, method, _timed(getattr(buckets, method), "communication"))
    for name in COLLECTIVES:
        setattr(dist, name, _timed_collective(getattr(dist, name)))
    for module in (layers, mappings):
        for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
            if hasattr(module, name):
                setattr(module, name, _timed_collective(getattr(module, name)))


def _timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **options: Any) -> Any:
        with part(name):
            return function(*args, **options)

    return timed


def _timed_collective(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timed(*args: Any, **options: Any) -> Any:
        if running_clock() is None:
            return function(*args, **options)
        with part("communication"):
            work = function(*args, **options)
        return _TimedWork(work) if work is not None and options.get("async_op") else work

    return timed


class _TimedWork:
    """A collective under way, whose `wait` is timed."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *args: Any, **options: Any) -> Any:
        with part("communication"):
            return self._work.wait(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
