"""Signals ask the loop to save and leave; they never interrupt a step."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""What a SLURM job tells its ranks, again and again until they have ended."""
HANDLED = (signal.SIGINT, signal.SIGTERM, *WARNINGS)


class StopRequest:
    """Remembers the first signal; `agreed` shares it, so that all ranks leave after the same step.

    Behind the block warnings are ignored for good: what is left to do there (groups of ranks, the upload of a model) is what they ask for.
    """

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        for number in HANDLED:
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if number in WARNINGS else handler)  # type: ignore[arg-type]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    def agreed(self, device: torch.device, numbers: Sequence[int] = ()) -> tuple[int, list[int]]:
        """Number of the signal that some rank received, 0 when none did; and the largest over all ranks of each of `numbers`, which
        whoever has something to agree on at the end of each step sends along."""
        values = torch.tensor([self._received, *numbers], device=device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        signal_number, *largest = values.tolist()
        return int(signal_number), [int(number) for number in largest]
