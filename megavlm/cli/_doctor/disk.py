"""How fast the disk of the checkpoints is: a small file is written, fsynced, read back past the page cache, and removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from pathlib import Path

from megavlm.cli._doctor.check import Check
from megavlm.topology.table import human_bytes

WRITTEN_BYTES = 64 << 20
LIMIT_S = 5.0
"""A slow disk is measured by as much as it takes in this time."""
_BLOCK_BYTES = 4 << 20


LOST = "no checkpoint, and no metrics, can be written: choose another run.dir, or mend its permissions"
SHORT = "make room, lower checkpoint.keep_last, or choose another run.dir"


def check_disk(folder: Path, needed: bool, wanted_bytes: int = 0, replaced_bytes: int = 0, lost: str = LOST, short: str = SHORT) -> Check:
    """Speed and room of the file system that `folder` is on, or will be once it is made.

    Args:
        needed: whether a run writes there.
        wanted_bytes: room that its checkpoints take; 0: unknown.
        replaced_bytes: of those that are there already and are deleted when newer ones come.
        lost: what it means when nothing can be written there.
        short: what to do where there is too little room.
    """
    name, there = f"disk of {folder}", _nearest(folder)
    try:
        written, write_s, read_s = _measure(there)
    except OSError as error:
        return Check(name, "broken", f"{there}: {error.strerror or error}", lost, needed)
    free = shutil.disk_usage(there).free
    detail = (
        f"write and fsync {human_bytes(int(written / write_s))}/s, read {human_bytes(int(written / read_s))}/s "
        f"({human_bytes(written)}); {human_bytes(free)} free"
    )
    if wanted_bytes:
        more = max(wanted_bytes - replaced_bytes, 0)
        takes = f"checkpoints take about {human_bytes(wanted_bytes)}"
        takes += f", {human_bytes(more)} more than those that they replace" if replaced_bytes else ""
        if more > free:
            return Check(name, "broken", detail, f"{takes}: {short}", needed)
        detail += f"; {takes}"
    return Check(name, "ok", detail, lost, needed)


def _nearest(folder: Path) -> Path:
    """The folder, or the closest one above it that exists: the doctor makes none."""
    folder = folder.resolve()
    return next(p for p in (folder, *folder.parents) if p.is_dir())


def _measure(folder: Path) -> tuple[int, float, float]:
    """(bytes, seconds to write and fsync them, seconds to read them)."""
    block = os.urandom(_BLOCK_BYTES)  # a file system that compresses must not look fast
    descriptor, path = tempfile.mkstemp(prefix=".megavlm-doctor-", dir=folder)
    try:
        begin, written = time.perf_counter(), 0
        while written < WRITTEN_BYTES and (time.perf_counter() - begin < LIMIT_S or not written):
            written += os.write(descriptor, block)
        os.fsync(descriptor)
        write_s = time.perf_counter() - begin
        with contextlib.suppress(OSError, AttributeError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.lseek(descriptor, 0, os.SEEK_SET)
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < LIMIT_S and (found := os.read(descriptor, _BLOCK_BYTES)):
            count += len(found)
        read_s = (time.perf_counter() - begin) * written / max(count, 1)
    finally:
        os.close(descriptor)
        Path(path).unlink()
    return written, write_s, read_s
