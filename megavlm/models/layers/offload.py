"""Activations that wait in host memory for their backward pass, and come back a layer ahead of it.

What autograd keeps of a layer is packed and unpacked by hooks (`torch.autograd.graph.saved_tensors_hooks`). On CUDA the copies run on two
streams of their own, so that they overlap with computation; elsewhere they are plain copies, by the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch.distributed.tensor import DTensor

SMALLEST_BYTES = 1 << 12
"""Smaller tensors stay where they are: a copy costs more than they do."""


class _Kept:
    """One tensor that autograd keeps: in host memory, and on the device again once somebody asks for it."""

    def __init__(self, tensor: torch.Tensor, copied: torch.Tensor) -> None:
        self.host, self.device = copied, tensor.device
        self.back: torch.Tensor | None = None
        self.is_back: Any = None


class _Streams:
    """Where copies run."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.out: torch.cuda.Stream | None = torch.cuda.Stream(device) if self.is_cuda else None
        self.back: torch.cuda.Stream | None = torch.cuda.Stream(device) if self.is_cuda else None

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        host = torch.empty_like(tensor, device="cpu", pin_memory=self.is_cuda)
        if not self.is_cuda:
            return host.copy_(tensor)
        assert self.out is not None
        self.out.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self.out):
            host.copy_(tensor, non_blocking=True)
        # The allocator must not give the memory away before the copy is done.
        tensor.record_stream(self.out)
        return host

    def fetch(self, kept: _Kept) -> None:
        """Start the way back."""
        if kept.back is not None:
            return
        if not self.is_cuda:
            kept.back = kept.host.clone()
            return
        assert self.out is not None and self.back is not None
        self.back.wait_stream(self.out)
        with torch.cuda.stream(self.back):
            kept.back = torch.empty_like(kept.host, device=kept.device)
            kept.back.copy_(kept.host, non_blocking=True)
            kept.is_back = self.back.record_event()

    def wait(self, kept: _Kept) -> torch.Tensor:
        """The tensor on its device, for use on the current stream; fetched when nobody has yet."""
        self.fetch(kept)
        assert kept.back is not None
        if self.is_cuda:
            current = torch.cuda.current_stream(kept.device)
            current.wait_event(kept.is_back)
            kept.back.record_stream(current)
        return kept.back


class Offloader:
    """The layers of one forward pass through a block, in the order in which they run."""

    def __init__(self, device: torch.device) -> None:
        self._streams = _streams(device)
        self._layers: list[list[_Kept]] = []

    @contextmanager
    def layer(self, module: torch.nn.Module, shared: Iterable[torch.Tensor] = ()) -> Iterator[None]:
        """Around the forward pass of a layer. Its parameters are not copied, nor what is small, nor what all layers share."""
        elsewhere = {tensor.untyped_storage().data_ptr() for tensor in shared}
        number = len(self._layers)
        kept: list[_Kept] = []
        self._layers.append(kept)
        same: dict[Any, _Kept] = {}
        held: list[torch.Tensor] = []  # keeps addresses from being used again while `same` goes by them

        def pack(tensor: torch.Tensor) -> torch.Tensor | tuple[int, _Kept]:
            is_small = tensor.numel() * tensor.element_size() < SMALLEST_BYTES
            if is_small or not tensor.is_floating_point() or tensor.untyped_storage().data_ptr() in elsewhere or _is_weight(tensor, module):
                return tensor
            place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
            if place not in same:
                same[place] = _Kept(tensor, self._streams.to_host(tensor.detach()))
                kept.append(same[place])
                held.append(tensor.detach())
            return number, same[place]

        def unpack(packed: torch.Tensor | tuple[int, _Kept]) -> torch.Tensor:
            if isinstance(packed, torch.Tensor):
                return packed
            layer, tensor = packed
            for done in self._layers[layer + 1 :]:
                # Backward passes go from the last layer to the first: nobody asks for these again but those that hold them.
                done.clear()
            for ahead in (self._layers[layer], self._layers[layer - 1] if layer else []):
                for other in ahead:
                    self._streams.fetch(other)
            return self._streams.wait(tensor)

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
        same.clear()
        held.clear()


def _is_weight(tensor: torch.Tensor, module: torch.nn.Module) -> bool:
    """Asked anew for each tensor: sharded layers gather their parameters when they begin."""
    address = tensor.untyped_storage().data_ptr()
    return any(not isinstance(p, DTensor) and p.untyped_storage().data_ptr() == address for p in module.parameters())


_made: dict[torch.device, _Streams] = {}


def _streams(device: torch.device) -> _Streams:
    if device not in _made:
        _made[device] = _Streams(device)
    return _made[device]


def offloaded(offloader: Offloader | None, module: torch.nn.Module, shared: Iterable[torch.Tensor] = ()) -> AbstractContextManager[None]:
    """`offloader`'s context of a layer, or none. What all layers share (`shared`) stays on the device anyway, and is not copied."""
    return nullcontext() if offloader is None else offloader.layer(module, shared)
