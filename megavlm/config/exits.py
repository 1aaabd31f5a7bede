"""What a run's exit code says: one table, for ranks, launchers and whoever restarts them."""

from __future__ import annotations

import contextlib
import os
from enum import IntEnum
from pathlib import Path

EXIT_NOTE_VARIABLE = "MEGAVLM_EXIT_NOTE"
"""A file that the first of many ranks to fail writes its exit code to: SLURM keeps the highest, which a killed neighbour's is."""

RESUME_NOTE_VARIABLE = "MEGAVLM_RESUME_NOTE"
"""A file that rank 0 writes the step to that it goes on from: progress of which `latest` knows nothing, from the nodes' own disks."""


class Exit(IntEnum):
    """Exit codes of a rank, of the local launcher and of a SLURM job's script; 128 + N is signal N."""

    _meaning: str

    def __new__(cls, code: int, meaning: str) -> Exit:
        member = int.__new__(cls, code)
        member._value_ = code
        member._meaning = meaning
        return member

    @property
    def meaning(self) -> str:
        """In words."""
        return self._meaning

    DONE = 0, "the recipe is done, or run.max_steps is reached"
    FAULT = 1, "a fault of the program or the machine, with a traceback"
    USER = 2, "something that the user can mend: recipe, data, files"
    SAVE_TIMEOUT = 76, "a save took longer than checkpoint.timeout_s"
    HUNG = 77, "a section of the run (set-up, step, checkpoint, evaluation) took longer than its limit in faults.watchdog"
    FAULTS_EXHAUSTED = 78, "a loss or gradient that is not a number, or a spike: more than the recipe's faults block lets pass"
    REPLICAS_DIVERGED = 79, "ranks that must hold the same parameters hold different ones"
    DISK_FULL = 80, "a checkpoint could not be written, and checkpoint.on_disk_full says to end then"
    SAVE_FAILED = 81, "a checkpoint could not be written, for another reason than a full disk"
    UNREADABLE = 82, "no checkpoint could be read: the disk or the file server gave errors"
    NO_PROGRESS = 86, "restarts in a row that reached no newer checkpoint (script of a SLURM job)"

    @classmethod
    def describe(cls, code: int) -> str:
        """What an exit code says, in words; signals included."""
        if code > 128:
            return f"ended by signal {code - 128}"
        return next((known.meaning for known in cls if known == code), "unknown")


def note_exit(code: int) -> None:
    """Leave the exit code where the launcher of this rank asked for it, if it is a failure and the first."""
    path = os.environ.get(EXIT_NOTE_VARIABLE)
    if path and code:
        with contextlib.suppress(OSError), open(path, "x", encoding="utf-8") as file:
            file.write(f"{int(code)}\n")


def note_resumed(step: int) -> None:
    """Leave the step that a start goes on from where the launcher of this rank asked for it."""
    path = os.environ.get(RESUME_NOTE_VARIABLE)
    if path:
        with contextlib.suppress(OSError):
            Path(path + ".tmp").write_text(f"{step}\n", encoding="utf-8")
            os.replace(path + ".tmp", path)
