"""Open files that several threads read from."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT = 64
"""Files that stay open: a checkpoint has one for each rank that wrote it, and a process may have a thousand."""


class Handles:
    """Files that are opened when they are first asked for; of those that nobody reads the one that was used longest ago is closed first.

    Args:
        limit: so many stay open; more only while more threads than that read at once.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._readers: dict[int, int] = {}
        """Handle -> threads that read from it now."""
        self._dropped: set[int] = set()
        """Closed by the last of their readers."""

    @contextmanager
    def reading(self, file: Path) -> Iterator[int]:
        """A handle for `os.pread`. One that an OSError came from is not used again."""
        handle = self._taken(file)
        try:
            yield handle
        except OSError:
            with self._lock:
                if self._open.get(file) == handle:
                    del self._open[file]
                    self._dropped.add(handle)
            raise
        finally:
            self._left(handle)

    def close(self) -> None:
        """Close all; nobody may be reading."""
        with self._lock:
            for handle in self._open.values():
                os.close(handle)
            self._open.clear()
            self._readers.clear()

    def _taken(self, file: Path) -> int:
        with self._lock:
            handle = self._open.get(file)
            if handle is None:
                handle = self._open[file] = os.open(file, os.O_RDONLY)
                self._readers[handle] = 0
            self._open.move_to_end(file)
            self._readers[handle] += 1
            return handle

    def _left(self, handle: int) -> None:
        with self._lock:
            self._readers[handle] -= 1
            if handle in self._dropped and not self._readers[handle]:
                self._dropped.discard(handle)
                self._close(handle)
            idle = [file for file, other in self._open.items() if not self._readers[other]]
            for file in idle[: max(len(self._open) - self._limit, 0)]:
                self._close(self._open.pop(file))

    def _close(self, handle: int) -> None:
        del self._readers[handle]
        os.close(handle)
