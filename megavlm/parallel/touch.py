"""Modules that a microbatch does not need, taken part in nonetheless: every rank must see the same gathers and reductions.

A rank whose microbatch has no picture does not run the encoder. Others do, and wait: overlapped reductions count gradients as they
arrive, and sharded layers gather their parameters when they run. Here hooks run and zero gradients arrive, without any computation.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule


class _Touch(torch.autograd.Function):
    """The first argument; all others get a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, zero: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.like = [(p.shape, p.dtype, p.device) for p in parameters]
        return zero.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grad, *(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.like)


def touch(zero: torch.Tensor, parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """`zero` (), now with a gradient of zero for each of `parameters` that trains."""
    trained = [p for p in parameters if p.requires_grad]
    return _Touch.apply(zero, *trained) if trained else zero  # type: ignore[no-untyped-call]


def run_hooks(module: torch.nn.Module) -> None:
    """What would run before the module's own forward (not that of modules inside it): waiting for an overlapped gather."""
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def touch_layer(zero: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    """`zero` as it comes out of a layer that gathers its parameters, reduces their gradients and computes nothing."""
    if not isinstance(layer, FSDPModule):
        for module in layer.modules():
            run_hooks(module)
        return touch(zero, layer.parameters())
    # The layer's hooks do the rest: they run around whatever stands for its forward.
    layer.forward = lambda z: touch(z, layer.parameters())
    try:
        return torch.nn.Module.__call__(layer, zero)
    finally:
        del layer.forward
