"""A save that does not come to an end must end the job: a hung file system would otherwise burn the whole allocation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megavlm.config.exits import Exit
from megavlm.parallel.watchdog import end_process

EXIT_CODE = Exit.SAVE_TIMEOUT
"""Exit code of a rank whose save took too long."""


@contextmanager
def watchdog(what: str, timeout_s: float) -> Iterator[None]:
    """Ends the process with `EXIT_CODE` and all its stacks (parallel/watchdog.py) when the block takes longer than `timeout_s`.

    An exception would not do: the thread that hangs sits in a system call or a collective, and hears none.
    """

    def end() -> None:
        end_process(f"{what} took longer than checkpoint.timeout_s={timeout_s:g} s", EXIT_CODE)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
