"""Where a step's time goes: named spans, and tokens per second over a window of steps.

Wall-clock time of the calling thread. Work queued on a GPU is not waited for: a span then shows the time to launch it,
and the wait shows up in the span that first needs a result. Adding a synchronisation to look would slow what it looks at.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Seconds spent in named spans between two calls of `finish_step`.

    with timer.span("data_wait"): ...
    with timer.span("forward_backward"): ...
    times = timer.finish_step()  # {"data_wait_s": ..., "forward_backward_s": ..., "step_time_s": ...}

    Spans may be nested under different names (an outer one includes its inner ones) and repeated (they add up).
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._open: set[str] = set()
        self._step_began = clock()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Add the time inside the block to `name`, also when the block raises."""
        assert name not in self._open, f"span {name!r} is open already: its time would count twice"
        self._open.add(name)
        began = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - began
            self._open.discard(name)

    def finish_step(self) -> dict[str, float]:
        """Seconds of each span as "<name>_s", and "step_time_s": all the time since the last call. Starts the next step."""
        now = self._clock()
        times = {f"{name}_s": seconds for name, seconds in self._seconds.items()}
        times["step_time_s"] = now - self._step_began
        self._seconds, self._step_began = {}, now
        return times

    def restart(self) -> None:
        """Forget everything since the last step: after a set-up, or a checkpoint that should not count as step time."""
        self._seconds, self._step_began = {}, self._clock()


class ThroughputMeter:
    """Tokens per second over the last `window_steps` steps; one slow step neither hides nor rules the number."""

    def __init__(self, window_steps: int = 20) -> None:
        self._steps: deque[tuple[int, float]] = deque(maxlen=window_steps)

    def add(self, tokens: int, seconds: float) -> float:
        """Count one step of `tokens` that took `seconds`; returns tokens per second of the window."""
        self._steps.append((tokens, seconds))
        return self.tokens_per_s

    @property
    def tokens_per_s(self) -> float:
        """0.0 before the first step."""
        seconds = sum(s for _, s in self._steps)
        return sum(t for t, _ in self._steps) / seconds if seconds > 0 else 0.0
