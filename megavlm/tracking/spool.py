"""Records on their way to MLflow: a folder of files that one process appends to and another reads, without a lock between them.

The writer appends to the newest file and begins another every RECORDS_PER_FILE records. The reader goes through them in order, notes
how far it got in a file of its own, and deletes a file once all of it was delivered and a newer one is there. So a writer never waits
for a reader that hangs, and what either of them was killed in the middle of is on the disk.

Records are sent at least once, never at most once: a reader killed between sending and noting sends them again. MLflow keeps one copy
of a metric with the same key, step, time and value, and the rest overwrite themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megavlm.tracking.line_file import LineFile
from megavlm.tracking.metrics import decode_line, encode_line

Item = dict[str, Any]
"""One of: {"kind": "metrics", "step", "time_ms", "values": {name: number}}, {"kind": "tags", "values": {name: text}},
{"kind": "artifact", "path", "folder"}, {"kind": "table", "path", "folder"}, {"kind": "model", "path", "name", "digest"},
{"kind": "status", "status", "time_ms"}."""

RECORDS_PER_FILE = 2_000
TORN = "a line of the spool that is no record (torn by a crash?)"
"""Why such a line is set aside."""
_DELIVERED = "delivered.json"
_FIELDS = {
    "metrics": ("step", "time_ms", "values"),
    "tags": ("values",),
    "artifact": ("path", "folder"),
    "table": ("path", "folder"),
    "model": ("path", "name", "digest"),
    "status": ("status", "time_ms"),
}
"""What a record of each kind must have."""


class SpoolWriter:
    """The appending side: one of them for a folder at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._number = max(_numbers(folder), default=0)
        self._records = 0
        self._file: LineFile | None = None

    def append(self, items: Iterable[Item]) -> None:
        """Add to the end and hand the lines to the operating system; a disk that is full gets them with a later call, or at `close`."""
        for item in items:
            self._open_file().append([encode_line(item)])
            self._records += 1

    def append_or_raise(self, items: Iterable[Item]) -> None:
        """Add all of them to the end, or none and raise OSError."""
        lines = [encode_line(item) for item in items]
        self._open_file().append_or_raise(lines)
        self._records += len(lines)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open_file(self) -> LineFile:
        if self._file is None:
            self._file = self._next_file()
        elif self._records >= RECORDS_PER_FILE and not self._file.num_waiting:
            with contextlib.suppress(OSError):  # a full disk: this file grows on
                self._file = self._next_file()
        return self._file

    def _next_file(self) -> LineFile:
        # An earlier process's file is never gone on with: its reader may have noted its end and be about to delete it.
        opened = LineFile(_file(self._folder, self._number + 1))
        self.close()
        self._number, self._records = self._number + 1, 0
        return opened


class SpoolReader:
    """The delivering side."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._at = self._noted_at = self._noted()

    def peek(self, count: int) -> tuple[list[Item], list[str], tuple[int, int]]:
        """Up to `count` lines from the front: (items, lines that are no item, place to `advance` to)."""
        items: list[Item] = []
        bad: list[str] = []
        at = self._at
        for number in sorted(n for n in _numbers(self.folder) if n >= at[0]):
            offset = at[1] if number == at[0] else 0
            with open(_file(self.folder, number), "rb") as file:
                file.seek(offset)
                while len(items) + len(bad) < count and (line := file.readline()).endswith(b"\n"):
                    offset += len(line)
                    _sort(line, items, bad)
            at = (number, offset)
            if len(items) + len(bad) >= count:
                break
        return items, bad, at

    def advance(self, place: tuple[int, int]) -> None:
        """What lies before `place` has been dealt with: this reader does not give it again, and notes that on disk (`note`)."""
        self._at = place
        self.note()

    def note(self) -> None:
        """Note on disk how far this reader got, unless that is there, and delete files before it. Raises OSError; another call, also of
        `advance`, then tries again."""
        if self._at == self._noted_at:
            return
        replacement = self.folder / f"{_DELIVERED}.new"
        replacement.write_text(json.dumps({"file": self._at[0], "bytes": self._at[1]}), encoding="utf-8")
        os.replace(replacement, self.folder / _DELIVERED)
        self._noted_at = self._at
        for number in _numbers(self.folder):
            if number < self._at[0]:
                _file(self.folder, number).unlink(missing_ok=True)

    def keep(self, wanted: Callable[[Item], bool]) -> None:
        """Drop the records that are not `wanted`; lines that are no record stay, for `peek` to report. Only under the
        spool's locks (spool_folders.py)."""
        for number in sorted(_numbers(self.folder)):
            path = _file(self.folder, number)
            begin = self._at[1] if number == self._at[0] else 0
            if number < self._at[0]:
                continue
            old = _close_torn(path, path.read_bytes())
            lines = old[begin:].splitlines(keepends=True)
            kept = [line for line in lines if _is_kept(line, wanted)]
            if len(kept) < len(lines):
                replacement = path.with_suffix(".new")
                replacement.write_bytes(old[:begin] + b"".join(kept))
                os.replace(replacement, path)

    def __len__(self) -> int:
        """Lines still to be dealt with."""
        total = 0
        for number in _numbers(self.folder):
            if number >= self._at[0]:
                try:
                    data = _file(self.folder, number).read_bytes()
                except FileNotFoundError:  # delivered since, by the process whose spool this is
                    continue
                begin = self._at[1] if number == self._at[0] else 0
                total += sum(1 for line in data[begin:].splitlines() if line.strip())
        return total

    def _noted(self) -> tuple[int, int]:
        try:
            found = json.loads((self.folder / _DELIVERED).read_text(encoding="utf-8"))
            return int(found["file"]), int(found["bytes"])
        except (OSError, ValueError, KeyError, TypeError):  # not there, or torn: everything is sent, which does no harm
            return 0, 0


def _sort(line: bytes, items: list[Item], bad: list[str]) -> None:
    if not line.strip():
        return
    try:
        item = decode_line(line.decode())
        if any(field not in item for field in _FIELDS[item["kind"]]):
            raise ValueError("an incomplete record")
        items.append(item)
    except (ValueError, KeyError, TypeError):
        bad.append(line.decode(errors="replace").rstrip("\n"))


def _is_kept(line: bytes, wanted: Callable[[Item], bool]) -> bool:
    try:
        return wanted(decode_line(line.decode()))
    except (ValueError, KeyError, TypeError):
        return True


def _close_torn(path: Path, content: bytes) -> bytes:
    """A last line that a crash tore gets its end, so that it is read, found to be bad, and reported. Returns the content with it."""
    if not content or content.endswith(b"\n"):
        return content
    with open(path, "ab") as file:
        file.write(b"\n")
    return content + b"\n"


def _numbers(folder: Path) -> list[int]:
    return [int(p.stem) for p in folder.glob("*.jsonl") if p.stem.isdigit()] if folder.is_dir() else []


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.jsonl"
