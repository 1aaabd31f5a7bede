"""Signals ask the loop to save and leave; they never interrupt a step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class StopRequest:
    """Remembers the first signal; `agreed` shares it, so that all ranks leave after the same step."""

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in HANDLED:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def agreed(self, device: torch.device) -> int:
        """Number of the signal that some rank received; 0 when none did."""
        value = torch.tensor([self._received], device=device)
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
        return int(value.item())
