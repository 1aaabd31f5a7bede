"""The spools of a run: a folder in <run_dir>/mlflow-spool for each program that tells MLflow something of the run.

Two locks say who has to do with one: that of its writer, held while that program lives, and that of the one process that delivers it.
Whoever goes on with what an ended program left behind holds both, and is its owner (spool_owner.py), for some locks are not seen from
another machine; only then is anything of it rewritten or deleted. A spool whose locks cannot be had is left to their holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from megavlm.tracking.spool import Item, SpoolReader
from megavlm.tracking.spool_owner import Owner

SPOOL_FOLDER = "mlflow-spool"
WRITER_LOCK, DELIVERY_LOCK = "writer.lock", "delivery.lock"
OLD_LOCK = "lock"
"""Of a spool of an earlier version."""
PARTS = (".", "system", "files", "aside")
"""Of a spool, each read and written on its own: what the program put there; what its delivering process measured; files on their way; files
that the store did not take yet."""
UNLOCKED_AFTER_S = 600.0
"""A file system without locks tells nobody whether a program still runs: its spool is left alone until nothing changed for so long."""


class SpoolLock:
    """A lock on a file, held until `release` or the end of this process."""

    def __init__(self, file: BinaryIO | None) -> None:
        self._file = file

    @classmethod
    def take(cls, path: Path, own: bool = True) -> Self | None:
        """None where another process holds it, or the file is gone.

        Args:
            own: this process's folder, which is nobody else's business where there are no locks.
        """
        try:
            file = open(path, "r+b")  # noqa: SIM115 (closing it gives the lock back)
        except OSError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Deleted by the one who held it until now: the name may belong to another file already.
            is_there = os.fstat(file.fileno()).st_ino == path.stat().st_ino
        except BlockingIOError:
            is_there = False
        except FileNotFoundError:
            is_there = False
        except OSError:
            file.close()
            return cls(None) if own or _age_s(path.parent) > UNLOCKED_AFTER_S else None
        if is_there:
            return cls(file)
        file.close()
        return None

    def release(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):  # a child that was forked meanwhile has the file open too: closing it here would not do
                fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


@dataclass
class TakenSpool:
    """A spool that its program has left behind, with both its locks."""

    folder: Path
    locks: list[SpoolLock]
    owner: Owner | None
    """None: a spool without an owner's file."""
    is_removed: bool = False

    @classmethod
    def take(cls, folder: Path, only_look: bool = False) -> Self | None:
        """None where its program still runs, or another process delivers it.

        Args:
            only_look: it is given back at once, and this process does not become its owner.
        """
        owner = Owner.of(folder)
        taken = cls(folder, [], None)
        for name in (WRITER_LOCK, DELIVERY_LOCK):
            lock = SpoolLock.take(folder / name, own=owner is not None and owner.has_let_go())
            if lock is None:
                taken.release()
                return None
            taken.locks.append(lock)
        if owner is not None and not (owner.may_be_replaced() and (only_look or owner.replace())):
            taken.release()
            return None
        if not only_look:
            taken.owner = owner
        return taken

    def keep(self, wanted: Callable[[Item], bool]) -> None:
        """Drop the records that are not `wanted`, and end lines that a crash tore."""
        for part in PARTS:
            SpoolReader(self.folder / part).keep(wanted)

    def remove_if_done(self) -> bool:
        """Delete the folder when nothing waits in it. Returns whether it is gone."""
        if num_waiting(self.folder):
            return False
        remove_spool(self.folder)
        self.is_removed = True
        return True

    def let_go(self) -> None:
        """Any machine may have it when its locks are free, without waiting for this owner to fall silent."""
        if self.owner is not None:
            self.owner.let_go()

    def release(self) -> None:
        self.let_go()
        for lock in self.locks:
            lock.release()
        if self.is_removed:
            remove_spool(self.folder)  # what NFS kept of it while the locks were open


def make_spool(run_dir: Path, label: str, begun_ns: int | None = None) -> tuple[Path, SpoolLock]:
    """A spool for this process, and its writer's lock: nobody sees the folder before it is locked.

    Args:
        label: part of its name.
        begun_ns: since the epoch; spools are delivered in this order. None: now.

    Raises OSError where the folder cannot be made.
    """
    root = run_dir / SPOOL_FOLDER
    name = f"{time.time_ns() if begun_ns is None else begun_ns:020d}-{label}-{uuid.uuid4().hex[:8]}"
    fresh = root / f".{name}"
    while True:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # somebody's last spool went, and the folder of all with it
            fresh.mkdir()
            break
    for lock in (WRITER_LOCK, DELIVERY_LOCK):
        (fresh / lock).touch()
    Owner.make(fresh)
    held = SpoolLock.take(fresh / WRITER_LOCK)
    assert held is not None, f"{fresh} was made by this process, and nobody else knows its name"
    return fresh.rename(root / name), held


def spools_of(run_dir: Path) -> list[Path]:
    """The spools of a run, the oldest first."""
    root = run_dir / SPOOL_FOLDER
    # With a lock: a spool of an earlier version lies here without a folder of its own (old_spools.py), and has one named "system".
    return sorted(p.parent for p in root.glob(f"*/{WRITER_LOCK}") if not p.parent.name.startswith("."))


def is_at_last_words(folder: Path) -> bool:
    """Whether the program has ended and only its delivering process, on this machine, is still at work."""
    owner = Owner.of(folder)
    if owner is not None and not owner.may_be_replaced():
        return False
    lock = SpoolLock.take(folder / WRITER_LOCK, own=False)
    if lock is not None:
        lock.release()
    return lock is not None


def old_spools(run_dir: Path) -> list[Path]:
    """Folders that an earlier version used as spools (old_spools.py moves them)."""
    signs = ("*.jsonl", "delivered.json", "system", OLD_LOCK)
    folders = [run_dir / SPOOL_FOLDER, *sorted(run_dir.glob(f"{SPOOL_FOLDER}-node-*"))]
    return [folder for folder in folders if any(any(folder.glob(sign)) for sign in signs)]


def num_waiting(folder: Path) -> int:
    """Records in a spool that MLflow has not taken."""
    try:
        return sum(len(SpoolReader(folder / part)) for part in PARTS)
    except FileNotFoundError:  # delivered and deleted meanwhile
        return 0


def remove_spool(folder: Path) -> None:
    """Delete a spool, and the folder of all spools with the last of them. Only with both its locks; once more when they are closed, since
    NFS keeps a deleted file that is open, under another name, and with it the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()


@dataclass(frozen=True)
class Waiting:
    """Records in the spools of a run."""

    left: int
    """Of programs that have ended: nobody is about to send them."""
    held: int
    """Of programs that still run, or another process delivers: they are sent without anybody's doing. Also of those killed on another
    machine a moment ago (spool_owner.py)."""
    ending: int = 0
    """Of `held`, those whose program has ended: its delivering process is at its last words."""


def waiting_of(run_dir: Path) -> Waiting:
    """What waits for MLflow in a run's spools."""
    left, held, ending = 0, sum(num_waiting(folder) for folder in old_spools(run_dir)), 0
    for folder in spools_of(run_dir):
        taken = TakenSpool.take(folder, only_look=True)
        if taken is None:
            held += num_waiting(folder)
            ending += num_waiting(folder) if is_at_last_words(folder) else 0
            continue
        left += num_waiting(folder)
        taken.release()
    return Waiting(left, held, ending)


@contextmanager
def only_one(path: Path, timeout_s: float = 10.0) -> Iterator[None]:
    """One process at a time goes through here with this file. Raises TimeoutError when another one takes longer."""
    path.touch()
    end = time.monotonic() + timeout_s
    while (lock := SpoolLock.take(path)) is None:
        if time.monotonic() > end:
            raise TimeoutError(f"another process has held {path} for {timeout_s:g} s")
        time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def _age_s(folder: Path) -> float:
    """Seconds since anything in a folder changed."""
    newest = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(OSError):
            newest = max(newest, path.stat().st_mtime)
    return time.time() - newest
