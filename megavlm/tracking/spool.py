"""A file of records that MLflow has not taken yet: appended by a run, sent later, by the same run or the next.

Records are sent at least once, never at most once: a run killed between sending and shortening the file sends them
again. MLflow keeps one copy of a metric with the same key, step, time and value, and the rest overwrite themselves.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megavlm.tracking.metrics import decode_line, encode_line

Item = dict[str, Any]
"""One of: {"kind": "metrics", "step", "time_ms", "values": {name: number}}, {"kind": "tags", "values": {name: text}},
{"kind": "artifact", "path", "folder"}, {"kind": "status", "status", "time_ms"}."""


class Spool:
    """First in, first out, on disk; safe to use from several threads of one process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._offset = 0

    def append(self, items: Iterable[Item]) -> None:
        """Add to the end and hand the lines to the operating system."""
        lines = "".join(f"{encode_line(item)}\n" for item in items)
        if not lines:
            return
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file:
                # A line torn by a crash stays one bad line instead of spoiling the next.
                if file.tell() and not _ends_with_newline(file):
                    file.write(b"\n")
                file.write(lines.encode())

    def peek(self, count: int) -> tuple[list[Item], list[str], int]:
        """Up to `count` lines from the front: (items, lines that are no item, position to `advance` to)."""
        items: list[Item] = []
        bad: list[str] = []
        with self._lock:
            if not self.path.exists():
                return [], [], self._offset
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                for _ in range(count):
                    if not (line := file.readline()):
                        break
                    try:
                        item = decode_line(line.decode())
                        if "kind" not in item:
                            raise ValueError("no kind")
                        items.append(item)
                    except ValueError:
                        bad.append(line.decode(errors="replace").rstrip("\n"))
                return items, bad, file.tell()

    def advance(self, position: int) -> None:
        """The lines before `position` have been dealt with."""
        self._offset = position

    def compact(self) -> None:
        """Drop the lines that have been dealt with; removes the file when none is left."""
        with self._lock:
            if not self.path.exists():
                self._offset = 0
                return
            if self._offset == 0:
                return
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                rest = file.read()
            if rest:
                replacement = self.path.with_suffix(".new")
                replacement.write_bytes(rest)
                os.replace(replacement, self.path)
            else:
                self.path.unlink()
            self._offset = 0

    def keep(self, wanted: Callable[[Item], bool]) -> None:
        """Drop the records that are not `wanted`; lines that are no record stay, for `peek` to report."""
        with self._lock:
            if not self.path.exists():
                return
            replacement = self.path.with_suffix(".new")
            with open(self.path, "rb") as old, open(replacement, "wb") as new:
                for line in old:
                    try:
                        drop = not wanted(decode_line(line.decode()))
                    except (ValueError, KeyError):
                        drop = False
                    if not drop:
                        new.write(line)
            os.replace(replacement, self.path)
            self._offset = 0

    def __len__(self) -> int:
        """Lines still to be dealt with."""
        with self._lock:
            if not self.path.exists():
                return 0
            with open(self.path, "rb") as file:
                file.seek(self._offset)
                return sum(1 for _ in file)


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")
