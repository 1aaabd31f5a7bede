"""Ends a rank that hangs, with the stacks of all its threads on the disk.

A thread looks at the clock; it needs the interpreter for a moment only, and what hangs (collectives, file systems, sleeps) has let go of
it. Should something have kept it, a timer of faulthandler's, which needs no interpreter, prints the stacks on stderr and ends the
process with exit code 1 a few seconds later. A process that was stopped (SIGSTOP) can do neither: the other ranks, which wait for it,
say that it has left no stacks, and the launcher kills it.

Ranks are in the same sections at the same time, so that one that hangs makes all of them exceed the limit. The first leaves a mark in the
folder, which the others look for once they have used up half of theirs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from megavlm.config.exits import Exit, note_exit

MARK, MISSING = "hang", "missing"
"""Files in the folder: that a rank hangs, with its exit code; ranks that left no stacks."""
POLL_S = 0.25
GATHER_S = 2.0
"""How long the first rank waits for the stacks of the others before it ends and the launcher kills them."""
FALLBACK_S = 4.0
"""After the limit: by then the thread has ended the process, unless it could not."""
_at_work: list[Watchdog] = []


@dataclass(frozen=True)
class _Section:
    name: str
    limit_s: float | None
    setting: str
    """What to raise where the limit is too low."""
    code: int
    begin: float

    @property
    def deadline(self) -> float | None:
        return None if self.limit_s is None else self.begin + self.limit_s


class Watchdog:
    """One a process, at work between `with` and its end.

    with Watchdog(folder, rank, world_size) as dog:
        dog.enter("setup", 600, "faults.watchdog.setup_s")
        while ...:
            dog.enter("step", 180, "faults.watchdog.step_s")
            with dog.during("checkpoint", 600, "checkpoint.timeout_s"): ...

    Args:
        folder: where ranks write rank-<N>.txt; made when there is something to write.
        rank, world_size: whose stacks these are, and how many are expected.
    """

    def __init__(self, folder: Path, rank: int, world_size: int) -> None:
        self.folder, self.rank, self.world_size = folder, rank, world_size
        self._section: _Section | None = None
        self._armed: _Section | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def enter(self, name: str, limit_s: float | None, setting: str, code: int = Exit.HUNG) -> None:
        """A section begins here, and the one before it ends. None: no limit."""
        self._section = _Section(name, limit_s, setting, code, time.monotonic())

    @contextlib.contextmanager
    def during(self, name: str, limit_s: float | None, setting: str, code: int = Exit.HUNG) -> Iterator[None]:
        """A section inside another, whose time begins anew behind it."""
        around = self._section
        self.enter(name, limit_s, setting, code)
        try:
            yield
        finally:
            if around is not None:
                self.enter(around.name, around.limit_s, around.setting, around.code)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        _at_work.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _at_work.remove(self)
        self._closed.set()
        self._thread.join(timeout=5)
        if self._armed is not None:
            faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            section, now = self._section, time.monotonic()
            if section is None:
                continue
            self._arm(section, now)
            if section.deadline is None or section.limit_s is None:
                continue
            if now >= section.deadline:
                self.end(f"{section.name} takes longer than {section.setting}={section.limit_s:g} s", section.code)
            elif now >= section.begin + section.limit_s / 2 and (code := self._code_of_mark()):
                self.end(f"another rank hangs, and this one is in: {section.name}", code)

    def _arm(self, section: _Section, now: float) -> None:
        """Set the timer that needs no interpreter, once a section."""
        if section is self._armed:
            return
        self._armed = section
        if section.deadline is None:
            faulthandler.cancel_dump_traceback_later()
        else:
            faulthandler.dump_traceback_later(max(section.deadline - now, 0.0) + FALLBACK_S, exit=True, file=2)

    def _code_of_mark(self) -> int | None:
        """The exit code of a rank that hangs; None while none does."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / MARK).read_text(encoding="utf-8"))
        return None

    def end(self, why: str, code: int) -> None:
        """End this process with its stacks on the disk. The disk may be what hangs: then they are on stderr."""
        faulthandler.dump_traceback_later(FALLBACK_S, exit=True, file=2)
        _say(f"rank {self.rank}: {why}; its stacks are in {self.folder / _name(self.rank)}")
        if not _in_time(lambda: self._leave_stacks(why, code), GATHER_S + 0.5):
            _say(f"{self.folder} does not answer")
            faulthandler.dump_traceback(file=2, all_threads=True)
        _exit(code, f"rank {self.rank}")

    def _leave_stacks(self, why: str, code: int) -> None:
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        write_stacks(self.folder / _name(self.rank), why)
        (self.folder / MARK).write_text(f"{int(code)}\n", encoding="utf-8")
        self._await_others(began)

    def _await_others(self, began: float) -> None:
        """Until all ranks have written their stacks; the first that has waited long enough says who did not."""
        while (missing := self._missing()) and time.monotonic() < began + GATHER_S:
            time.sleep(POLL_S / 2)
        if not missing:
            return
        whose = ", ".join(map(str, missing[:16])) + (" ..." if len(missing) > 16 else "")
        with contextlib.suppress(FileExistsError), (self.folder / MISSING).open("x", encoding="utf-8") as file:
            file.write(f"{whose}\n")
            _say(f"no stacks from rank {whose}: stopped, killed, or without a network or file system. Look there first")

    def _missing(self) -> list[int]:
        there = {path.name for path in self.folder.glob("rank-*.txt")}
        return [rank for rank in range(self.world_size) if _name(rank) not in there]


def end_process(why: str, code: int) -> None:
    """End this process for something that hangs, with all stacks: where its watchdog leaves them, or on stderr where none is at work."""
    if _at_work:
        _at_work[-1].end(why, code)
    _say(why)
    faulthandler.dump_traceback(file=2, all_threads=True)
    _exit(code, "this process")


def _exit(code: int, who: str) -> None:
    _in_time(lambda: note_exit(code), 0.5)
    _say(f"{who} ends with exit code {int(code)} ({Exit.describe(code)})")
    os._exit(code)


def _in_time(action: Callable[[], None], limit_s: float) -> bool:
    """Whether it was done, without an error, before the limit; else it is left behind."""
    done = threading.Event()

    def act() -> None:
        with contextlib.suppress(OSError):
            action()
            done.set()

    thread = threading.Thread(target=act, daemon=True, name="watchdog's last words")
    thread.start()
    thread.join(limit_s)
    return done.is_set()


def write_stacks(path: Path, why: str) -> None:
    """The stacks of all threads of this process, with the threads' names, in place of what the file held."""
    with path.open("w", encoding="utf-8") as file:
        file.write(f"{time.strftime('%F %T')} process {os.getpid()} on {os.uname().nodename}: {why}\n")
        for thread in threading.enumerate():
            file.write(f"thread 0x{thread.ident or 0:016x}: {thread.name}\n")
        file.write("\n")
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)


def set_earlier_stacks_aside(folder: Path) -> None:
    """What an earlier start left becomes <folder>-1, <folder>-2, ...: it must not be taken for this one's. One process calls this."""
    if not folder.exists():
        return
    number = 1
    while (aside := folder.with_name(f"{folder.name}-{number}")).exists():
        number += 1
    with contextlib.suppress(OSError):
        folder.rename(aside)


def _name(rank: int) -> str:
    return f"rank-{rank}.txt"


def _say(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
        sys.stderr.write(f"megavlm: {line}\n")
        sys.stderr.flush()
