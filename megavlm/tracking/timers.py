"""Where a step's time goes: every moment of a step belongs to exactly one part, so the parts add up to the step.

A clock is switched from part to part; a part inside another takes its time away from the outer one. On a CPU stamps are wall-clock
time of the calling thread. On a GPU they are events in its stream (megavlm.parallel.step_parts): nothing waits for them, and what the GPU
had not finished when the step was recorded counts to the next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any, NamedTuple, Protocol

PARTS = {
    "data": "waiting for the step's data",
    "copy": "moving microbatches to the device, and scaling loss weights",
    "encoder": "forward pass of the vision encoder",
    "projector": "forward pass of the projector",
    "language": "forward pass of the LLM's embeddings and layers",
    "head": "LM head and loss, with their gradients, which the forward pass computes",
    "language_backward": "backward pass of the LLM",
    "encoder_backward": "backward pass of projector and encoder",
    "communication": "waiting for collectives: gradients, parameters, tensor, context and expert ranks",
    "pipeline": "waiting for messages of other pipeline stages: the bubble, and their way",
    "optimizer": "gradient norm and update",
    "other": "everything else: Python, schedule, zeroing gradients",
}
"""Part of a step -> what it is; metrics.jsonl has the seconds of each under time_s."""


class Segment(NamedTuple):
    """A stretch of time in one part."""

    part: str
    microbatch: int | None
    begin_s: float
    end_s: float


class Stamps(Protocol):
    """A source of time stamps."""

    def now(self) -> Any: ...

    def seconds(self, first: Any, second: Any) -> float:
        """From one stamp to a later one, both reached."""
        ...

    def is_reached(self, stamp: Any) -> bool:
        """Has the device come so far?"""
        ...


class WallStamps:
    """Wall-clock time."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, first: float, second: float) -> float:
        return second - first

    def is_reached(self, stamp: float) -> bool:
        return True


class StepClock:
    """Seconds of each part of a step.

    clock.begin_step()
    with part("data"): ...
    clock.finish_step()  # {"data": 0.1, ..., "other": 0.02}

    Segments of the last finished step are in `segments`, in seconds from its first one, until the next is finished.
    """

    def __init__(self, stamps: Stamps | None = None) -> None:
        self._stamps = stamps or WallStamps()
        self._stack: list[tuple[str, int | None]] = []
        # (from when, which part or None between steps, microbatch)
        self._marks: list[tuple[Any, str | None, int | None]] = []
        self.segments: list[Segment] = []
        self.origin: Any = None
        """Stamp at which the segments' time begins."""

    def begin_step(self) -> None:
        """Everything from here on belongs to a step."""
        self._stack = [("other", None)]
        self._mark()

    def enter(self, name: str, microbatch: int | None) -> None:
        self._stack.append((name, self._stack[-1][1] if microbatch is None else microbatch))
        self._mark()

    def leave(self) -> None:
        self._stack.pop()
        self._mark()

    def turn(self, name: str, microbatch: int | None = None) -> None:
        """The innermost part goes on as another."""
        self._stack[-1] = (name, self._stack[-1][1] if microbatch is None else microbatch)
        self._mark()

    def finish_step(self) -> dict[str, float]:
        """Seconds of every part; those that did not occur have 0."""
        self._stack = []
        self._marks.append((self._stamps.now(), None, None))
        reached = next(i for i in range(len(self._marks) - 1, -1, -1) if i == 0 or self._stamps.is_reached(self._marks[i][0]))
        done, self._marks = self._marks[: reached + 1], self._marks[reached:]
        self.origin = done[0][0]
        at = [self._stamps.seconds(self.origin, stamp) for stamp, _, _ in done] if len(done) > 1 else [0.0]
        self.segments = [
            Segment(name, number, begin, end)
            for (_, name, number), begin, end in zip(done, at, at[1:], strict=False)
            if name is not None and end > begin
        ]
        return seconds_of(self.segments)

    @property
    def runs(self) -> bool:
        """Is a step going on?"""
        return bool(self._stack)

    def _mark(self) -> None:
        self._marks.append((self._stamps.now(), *self._stack[-1]))


def seconds_of(segments: Iterable[Segment]) -> dict[str, float]:
    """Seconds of every part of PARTS."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for segment in segments:
        seconds[segment.part] += segment.end_s - segment.begin_s
    return seconds


_clock: StepClock | None = None


def use_clock(clock: StepClock | None) -> None:
    """From here on `part` and `turn` of this process tell this clock; None: nobody."""
    global _clock
    _clock = clock


def running_clock() -> StepClock | None:
    """The clock in use while a step goes on."""
    return _clock if _clock is not None and _clock.runs else None


class part:
    """with part("encoder"): ...  Its time, less that of parts inside it, counts as the encoder's. Outside steps it does nothing.

    Args:
        name: of PARTS.
        microbatch: its number in the step; None: that of the part around it.
    """

    __slots__ = ("_clock", "_microbatch", "_name")

    def __init__(self, name: str, microbatch: int | None = None) -> None:
        self._name, self._microbatch = name, microbatch
        self._clock: StepClock | None = None

    def __enter__(self) -> None:
        self._clock = running_clock()
        if self._clock is not None:
            self._clock.enter(self._name, self._microbatch)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._clock is not None and self._clock.runs:
            self._clock.leave()
