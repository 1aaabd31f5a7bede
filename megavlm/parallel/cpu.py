"""Run megatron-core unchanged on a CPU over gloo.

megatron-core names CUDA in its code paths even where nothing needs a GPU: tensors are created on
`torch.cuda.current_device()`, random states are CUDA states, the distributed optimizer compares type strings.
`install()` redirects exactly those names. It is only ever called in a process that will not use a GPU, is idempotent,
and costs about a microsecond per tensor factory call (measured; a TorchFunctionMode costs twice that).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.cuda.random
import torch.utils._device

_CPU = torch.device("cpu")
_FACTORIES = (
    "tensor zeros ones empty full arange rand randn randint empty_like zeros_like ones_like full_like rand_like "
    "randn_like eye as_tensor linspace triu_indices tril_indices empty_strided"
).split()
_installed = False


def _on_cpu(device: Any) -> Any:
    """The CPU for anything that names a CUDA device (string, torch.device or ordinal); everything else unchanged."""
    if isinstance(device, str):
        return "cpu" if device.startswith("cuda") else device
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    return device


def _factory_on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if "pin_memory" in kwargs:
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


class _NoStream:
    """Stands in for a CUDA stream: every method does nothing, entering it changes nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def __enter__(self) -> _NoStream:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


def _patch_tensor_methods() -> None:
    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        if args and isinstance(args[0], str | torch.device | int):
            args = (_on_cpu(args[0]), *args[1:])
        return original_to(self, *args, **kwargs)

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = original_type(self, *args, **kwargs)
        if not isinstance(result, str) or not sys._getframe(1).f_globals.get("__name__", "").startswith("megatron."):
            return result
        # The optimizers accept 'torch.cuda.FloatTensor' and its bf16/fp16 sisters, by string.
        return result.replace("torch.", "torch.cuda.", 1)

    torch.Tensor.to = to  # type: ignore[method-assign, assignment]
    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def install() -> None:
    """Redirect megatron-core's CUDA names to the CPU in this process. Raises RuntimeError when CUDA is already in use."""
    global _installed
    if _installed:
        return
    if torch.cuda.is_initialized():
        raise RuntimeError("CUDA is already initialised in this process: run.device=cpu must be chosen before any CUDA use")
    _installed = True
    # torch caches its list of factories on first use; made after the wrapping, it would miss them, and transformers'
    # from_pretrained (which builds models under torch.device("meta")) would leave buffers uninitialised.
    torch.utils._device._device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _factory_on_cpu(getattr(torch, name)))
    _patch_tensor_methods()
    stream = _NoStream()
    for module in (torch.cuda, torch.cuda.random):
        module.current_device = lambda: _CPU  # type: ignore[attr-defined]
        module.synchronize = lambda *args, **kwargs: None  # type: ignore[attr-defined]
        module.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
        module.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)  # type: ignore[attr-defined]
        module.manual_seed = torch.manual_seed  # type: ignore[attr-defined]
    torch.cuda.is_available = lambda: False
    torch.cuda.empty_cache = lambda: None
    torch.cuda.current_stream = torch.cuda.default_stream = lambda *args, **kwargs: stream  # type: ignore[assignment]
    torch.cuda.Stream = _NoStream  # type: ignore[assignment, misc]
    torch.cuda.stream = lambda *args, **kwargs: stream  # type: ignore[assignment]
