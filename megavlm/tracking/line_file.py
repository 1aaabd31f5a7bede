"""A file that lines are appended to while a run goes on, whatever the disk says: a full one must not end the run."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from pathlib import Path

from megavlm.tracking.console import get_logger

MAX_WAITING_LINES = 10_000
"""Lines kept in memory while the disk takes none; beyond that the oldest are dropped, and counted."""

_log = get_logger(__name__)


class LineFile:
    """Appends lines, each handed to the operating system at once, so that a killed process loses none.

    A disk that refuses (full, over quota, gone for a while) is warned of once; the lines wait in memory and are written, in order, as soon
    as it takes them again. A line that was torn by a crash is closed first, so that it does not spoil the next.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._waiting: deque[bytes] = deque()
        self._in_trouble = False
        self.num_dropped = 0
        self.num_bytes = os.fstat(self._fd).st_size
        """Bytes of whole lines in the file."""
        if self.num_bytes and os.pread(self._fd, 1, self.num_bytes - 1) != b"\n":
            self.append([""])

    def append(self, lines: list[str]) -> None:
        """Add lines (without their end). Never raises for what a disk does."""
        with self._lock:
            self._waiting.extend(f"{line}\n".encode() for line in lines)
            self._write_waiting()

    def append_or_raise(self, lines: list[str]) -> None:
        """Add all of the lines, or none of them and raise OSError."""
        with self._lock:
            self._write(b"".join([*self._waiting, *(f"{line}\n".encode() for line in lines)]))
            self._waiting.clear()

    @property
    def num_waiting(self) -> int:
        """Lines that the disk has not taken yet."""
        return len(self._waiting)

    def close(self) -> None:
        """Try once more to write what waits, and close."""
        with self._lock:
            if self._fd < 0:
                return
            self._write_waiting()
            with contextlib.suppress(OSError):  # the last words of a network disk that is over its quota
                os.close(self._fd)
            self._fd = -1
            if self._waiting:
                _log.warning("%s lacks its last %d lines: the disk did not take them", self.path, len(self._waiting))

    def _write_waiting(self) -> None:
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._in_trouble:
                _log.warning("%s cannot be written (%s): its lines wait in memory until it can", self.path, error.strerror or error)
            self._in_trouble = True
            while len(self._waiting) > MAX_WAITING_LINES:
                self._waiting.popleft()
                self.num_dropped += 1
            return
        if self._in_trouble:
            _log.warning("%s can be written again; lines lost meanwhile: %d", self.path, self.num_dropped)
            self._in_trouble = False

    def _write(self, lines: bytes) -> None:
        """All of the lines, or nothing of them: a disk may take the first half and be full."""
        written = 0
        try:
            while written < len(lines):
                written += os.write(self._fd, lines[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.num_bytes)
            raise
        self.num_bytes += len(lines)
