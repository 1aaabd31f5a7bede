"""Which machine has to do with a spool, and whether it still does: locks alone do not say, for some file systems keep them within one
machine (BeeGFS, Lustre with -o localflock, NFS with local_lock), where a process on another machine would get any lock.

A file in the spool names the owner's machine in its own name, and its time is the owner's heartbeat. Whoever takes a spool over renames it,
and the file system lets only one process do so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Self

BEAT_EVERY_S = 5.0
SILENT_AFTER_S = 60.0
"""An owner on another machine whose last heartbeat is older is taken to be dead."""
_PREFIX, _NOBODY = "owner.", "none"


class Owner:
    """The owner's file of a spool."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @classmethod
    def make(cls, folder: Path) -> Self:
        """This process owns a new folder, which nobody else has seen. Raises OSError."""
        owner = cls(folder / _name())
        owner._path.touch()
        return owner

    @classmethod
    def of(cls, folder: Path) -> Self | None:
        """None: the folder has no such file, so that locks alone say whose it is."""
        found = sorted(folder.glob(f"{_PREFIX}*"))
        return cls(found[0]) if found else None

    def has_let_go(self) -> bool:
        """Whether nobody owns the spool."""
        return self._path.name == f"{_PREFIX}{_NOBODY}"

    def may_be_replaced(self) -> bool:
        """Asked by one who has the spool's locks: on the owner's machine they say that it is dead, elsewhere its silence does."""
        return self.has_let_go() or self._path.name.split(".")[1] == this_machine() or self._silent_s() > SILENT_AFTER_S

    def replace(self) -> bool:
        """Make this process the owner. False: another one was faster."""
        mine = self._path.with_name(_name())
        try:
            os.utime(self._path)  # first: nobody is to find this process's name with the time of a dead one
            self._path.rename(mine)
        except OSError:
            return False
        self._path = mine
        return True

    def let_go(self) -> None:
        """Nobody is the owner from now on. Of no effect where the spool is gone, or another's by now."""
        nobody = self._path.with_name(f"{_PREFIX}{_NOBODY}")
        with contextlib.suppress(OSError):
            self._path.rename(nobody)
            self._path = nobody

    def beat(self) -> None:
        """Show that the owner lives."""
        with contextlib.suppress(OSError):
            os.utime(self._path)

    def _silent_s(self) -> float:
        """Seconds since the last heartbeat; 0 where the file is another's by now."""
        try:
            with open(self._path, "rb") as file:  # opened, because NFS then asks its server instead of remembering a time
                return time.time() - os.fstat(file.fileno()).st_mtime
        except OSError:
            return 0.0


class Heart:
    """Beats for the owners that this process stands for, on a thread, since a server may keep the others waiting for minutes."""

    def __init__(self) -> None:
        self._owners: set[Owner] = set()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Until the process ends."""
        threading.Thread(target=self._beat_on, name="megavlm-heart", daemon=True).start()

    def add(self, owner: Owner | None) -> None:
        if owner is not None:
            with self._lock:
                self._owners.add(owner)
            owner.beat()

    def remove(self, owner: Owner | None) -> None:
        if owner is not None:
            with self._lock:
                self._owners.discard(owner)

    def _beat_on(self) -> None:
        while True:
            time.sleep(BEAT_EVERY_S)
            with self._lock:
                owners = list(self._owners)
            for owner in owners:
                owner.beat()


def this_machine() -> str:
    """Where locks are seen by all: one start of one kernel, and in it one container."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    identity = f"{boot.read_text() if boot.exists() else ''}{socket.gethostname()}"
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


def _name() -> str:
    return f"{_PREFIX}{this_machine()}.{uuid.uuid4().hex[:8]}"
