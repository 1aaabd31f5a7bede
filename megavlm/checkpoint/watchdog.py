"""A save that does not come to an end must end the job: a hung file system would otherwise burn the whole allocation."""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megavlm.config.exits import Exit

EXIT_CODE = Exit.SAVE_TIMEOUT
"""Exit code of a rank whose save took too long."""
log = logging.getLogger(__name__)


@contextmanager
def watchdog(what: str, timeout_s: float) -> Iterator[None]:
    """Ends the process with `EXIT_CODE` and all its stacks on stderr when the block takes longer than `timeout_s`.

    An exception would not do: the thread that hangs sits in a system call or a collective, and hears none.
    """

    def end() -> None:
        log.critical("%s took longer than checkpoint.timeout_s=%g s: this rank ends the job (exit code %d)", what, timeout_s, EXIT_CODE)
        sys.stderr.write(f"{what} took longer than checkpoint.timeout_s={timeout_s:g} s: this rank ends the job\n")
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(EXIT_CODE)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
