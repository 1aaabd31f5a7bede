"""A job that writes a folder piece by piece and can be killed at any moment: what is done is written down, and a second start goes on.

A line is appended only after the bytes that it tells of are on the disk. A folder begun by another job is emptied.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError

JOURNAL = "journal.jsonl"


class Journal:
    """The lines of an unfinished folder.

    Args:
        folder: made when it is not there.
        job: what is written, JSON: another value means that the folder's contents are of no use.

    Raises:
        CheckpointError: another process is writing this folder, or it holds something else.
    """

    def __init__(self, folder: Path, job: Any) -> None:
        self.folder = folder
        self.entries: list[Any] = []
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / JOURNAL).is_file() and any(folder.iterdir()):
            raise CheckpointError(f"{folder} is in the way, and no unfinished conversion: remove it, or write elsewhere")
        self._handle = os.open(folder / JOURNAL, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._handle)
            raise CheckpointError(f"another process is writing {folder}: wait for it") from None
        job = json.loads(json.dumps(job))
        lines, size = _whole_lines(folder / JOURNAL)
        if lines and lines[0] == job:
            os.ftruncate(self._handle, size)  # the end of a line that was cut off
            os.lseek(self._handle, 0, os.SEEK_END)
            self.entries = lines[1:]
        else:
            _empty(folder)
            os.ftruncate(self._handle, 0)
            self._append([job])

    def add(self, entries: Iterable[Any]) -> None:
        """Write down what lies on the disk by now."""
        entries = list(entries)
        self._append(entries)
        self.entries += entries

    def close(self) -> None:
        """Let go of the folder."""
        os.close(self._handle)

    def _append(self, entries: list[Any]) -> None:
        text = "".join(json.dumps(entry) + "\n" for entry in entries).encode()
        while text:
            text = text[os.write(self._handle, text) :]
        os.fsync(self._handle)
        folders.sync_folder(self.folder)


def publish(unfinished: Path, path: Path, *, replace: bool = False) -> None:
    """Give a finished folder its name. Its journal goes last: killed before, the job finds all of it done.

    Raises:
        CheckpointError: something has that name by now, and `replace` does not allow to delete it. What was written stays.
    """
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise CheckpointError(f"{path} came to be while {unfinished} was written: move one of them, and repeat the command")
    folders.put_in_place(unfinished, path)
    (path / JOURNAL).unlink(missing_ok=True)


def _whole_lines(file: Path) -> tuple[list[Any], int]:
    """(lines up to the first that is cut off, their bytes)."""
    lines, size = [], 0
    for line in file.read_bytes().splitlines(keepends=True):
        try:
            if not line.endswith(b"\n"):
                break
            lines.append(json.loads(line))
        except ValueError:
            break
        size += len(line)
    return lines, size


def _empty(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name == JOURNAL:
            continue
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
