"""Memory of this process as the operating system counts it: now, and at its most. Imports no torch."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESTART_PEAK = "5"
"""proc_pid_clear_refs(5), Linux 4.0."""


class ProcessMemory:
    """Growth of this process's resident memory since it was made.

    Pages that are only reserved do not count, and those of files that are mapped do. Where the system does not let a process restart its
    peak, the peak of the whole process's life stands for it.
    """

    def __init__(self) -> None:
        give_back()
        self._can_restart = self.restart()
        now, peak = read_status()
        # Without a restart nothing below the earlier peak can be seen.
        self._base = now if self._can_restart else peak

    def peak_bytes(self) -> int:
        """The most since the last `restart`, over what there was at the beginning."""
        return max(read_status()[1] - self._base, 0)

    def restart(self) -> bool:
        """Forget the peak so far. Returns whether the system does that."""
        try:
            _CLEAR.write_text(_RESTART_PEAK)
        except OSError:
            return False
        return True


def read_status() -> tuple[int, int]:
    """(bytes resident now, the most that were); where there is no /proc the second stands for both."""
    try:
        text = _STATUS.read_text()
    except OSError:
        peak = _most_ever()
        return peak, peak
    found = {line[:5]: int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith(("VmHWM", "VmRSS"))}
    return found["VmRSS"], found["VmHWM"]


def _most_ever() -> int:
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10


def give_back() -> None:
    """Freed memory that the C library keeps goes back to the system, where the library is glibc."""
    library = _c_library()
    if library is not None:
        library.malloc_trim(0)


@functools.cache
def _c_library() -> Any:
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "malloc_trim") else None
    except (OSError, TypeError):  # no dynamic libraries, or a system that wants a name
        return None
