"""Reading from a disk or a file server that may be away for a moment: what cannot be read is not yet damaged. No torch."""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

from megavlm.checkpoint.errors import Unreadable

T = TypeVar("T")
_log = logging.getLogger(__name__)
PAUSES_S = (0.5, 2.0, 8.0)
"""Between two attempts at the same read."""
MISSING = (FileNotFoundError, NotADirectoryError)
"""What a file system says that answers, and has no such file."""
_LASTING = {errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EISDIR}
"""Errors that no waiting mends."""
_waits = ContextVar("waits", default=True)


@contextmanager
def without_waiting() -> Iterator[None]:
    """Within this, what cannot be read at once cannot be read: for what may as well be done another time."""
    before = _waits.set(False)
    try:
        yield
    finally:
        _waits.reset(before)


def patiently(read: Callable[[], T], what: object) -> T:
    """The result of `read`, which is tried again where the system reports an error.

    Raises:
        Unreadable: it failed to the end. A missing file is no such error: FileNotFoundError and NotADirectoryError pass.
    """
    for pause_s in (*(PAUSES_S if _waits.get() else ()), None):
        try:
            return read()
        except MISSING:
            raise
        except OSError as error:
            if pause_s is None or error.errno in _LASTING:
                raise Unreadable(f"{what} cannot be read: {error.strerror or error}") from error
            _log.warning("%s cannot be read (%s): tried again in %g s", what, error.strerror or error, pause_s)
            time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")
