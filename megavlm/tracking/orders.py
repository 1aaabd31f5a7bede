"""What the process that delivers to MLflow hears of the one that started it: its settings, and when it is to end, by word or by death."""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
from collections.abc import Callable
from typing import Any

AFTER_DEATH_S = 3.0
"""A program that was killed is outlived by so much, whatever this process is waiting for; not where it was told to go on by itself."""
_LOOK_EVERY_S = 0.5
_FAREWELL_S = 0.5
"""Of a disk that hangs no more is waited for."""


class Orders:
    """The other end of the pipe from training: first a line of settings; later one that says how to end, or the pipe's end.

    The line is {"seconds": s, "leaves": bool, "insists": bool}: the time there is; whether it is spent without the program, which ends
    meanwhile; whether a store that does not answer is to be tried for all of it.

    Args:
        descriptor: of the pipe.
        parent: the process that started this one. The pipe alone would not tell of its death while another child of it has it open.
    """

    def __init__(self, descriptor: int, parent: int) -> None:
        self._descriptor, self._parent, self._read = descriptor, parent, b""
        self.ended = threading.Event()
        """Set when this process is to end."""
        self.insists_until = 0.0
        """Of time.monotonic: until then a store that does not answer is tried again. 0: it is tried once."""
        self.farewell: Callable[[], None] = lambda: None
        """Called where this process ends because its time is up."""

    def settings(self) -> dict[str, Any] | None:
        """None: training ended before it said anything."""
        line = self._next()
        return dict(json.loads(line)) if line else None

    def listen(self) -> None:
        """From now on `ended` is set as soon as this process is to end, and it does end in time, wherever it hangs."""
        threading.Thread(target=self._listen, name="megavlm-orders", daemon=True).start()

    def _listen(self) -> None:
        line = self._next()
        order: dict[str, Any] = json.loads(line) if line else {"seconds": AFTER_DEATH_S, "leaves": False, "insists": False}
        if order["leaves"]:
            _leave()
        if order["insists"]:
            self.insists_until = time.monotonic() + order["seconds"]
        self.ended.set()
        self._exit_after(order["seconds"])
        if not order["leaves"]:
            while self._next():
                pass  # nothing more is said: this is the program's death
            self._exit_after(AFTER_DEATH_S)

    def _exit_after(self, seconds: float) -> None:
        timer = threading.Timer(seconds, self._exit)
        timer.daemon = True
        try:
            timer.start()
        except RuntimeError:  # the machine has no other thread to give
            os._exit(3)

    def _exit(self) -> None:
        try:
            last = threading.Thread(target=self.farewell, daemon=True)
            last.start()
            last.join(_FAREWELL_S)
        finally:
            os._exit(3)

    def _next(self) -> bytes:
        """The next line, or b"" when there will be none."""
        while b"\n" not in self._read:
            if not select.select([self._descriptor], [], [], _LOOK_EVERY_S)[0]:
                if os.getppid() != self._parent:
                    return b""
                continue
            found = os.read(self._descriptor, 1 << 16)
            if not found:
                return b""
            self._read += found
        line, _, self._read = self._read.partition(b"\n")
        return line


def _leave() -> None:
    """Training does not wait for the end: nobody is to be held up by an output that this process has open, or to kill it with training."""
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    with contextlib.suppress(OSError):
        os.setsid()
