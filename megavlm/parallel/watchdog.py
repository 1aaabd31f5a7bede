"""Ends a rank that hangs, with the stacks of all its threads on the disk.

A thread looks at the clock; it needs the interpreter for a moment only, and what hangs (collectives, file systems, sleeps) has let go of
it. Should something have kept it, a timer of faulthandler's, which needs no interpreter, prints the stacks on stderr and ends the
process with exit code 1 a few seconds later. A process that was stopped (SIGSTOP) can do neither: the other ranks, which wait for it,
say that it has left no stacks, and the launcher kills it.

Ranks are in the same sections at the same time, so that one that hangs makes all of them exceed the limit. The first leaves a mark in the
folder, which the others look for once they have used up half of theirs.

The disk and the terminal may be what hangs. So the thread that looks at the clock touches neither: another looks for the mark, and what is
told when the process ends is told by threads that are left behind when they do not come back.
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
TELL_S = 0.5
"""How long a few words may take, on stderr or on the disk."""
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

    def is_half_over(self, now: float) -> bool:
        return self.limit_s is not None and now >= self.begin + self.limit_s / 2


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
        self._has_timer = False
        self._mark: int | None = None
        """The exit code of a rank that hangs; None while none is known to."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._ear = threading.Thread(target=self._listen, name="watchdog's ear", daemon=True)

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
        self._ear.start()
        _at_work.append(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _at_work.remove(self)
        self._closed.set()
        self._thread.join(timeout=5)
        self._disarm()

    def _watch(self) -> None:
        while not self._closed.wait(POLL_S):
            now = time.monotonic()  # before the section is read: one that begins in between is not overdue
            section = self._section
            if section is None:
                continue
            self._arm(section, now)
            mark = self._mark
            if section.deadline is not None and now >= section.deadline:
                self.end(f"{section.name} takes longer than {section.setting}={section.limit_s:g} s", section.code)
            elif mark is not None and section.is_half_over(now):
                self.end(f"another rank hangs, and this one is in: {section.name}", mark)

    def _arm(self, section: _Section, now: float) -> None:
        """Set the timer that needs no interpreter, once a section."""
        if section is self._armed:
            return
        self._armed = section
        if section.deadline is None:
            self._disarm()
        else:
            faulthandler.dump_traceback_later(max(section.deadline - now, 0.0) + FALLBACK_S, exit=True, file=2)
            self._has_timer = True

    def _disarm(self) -> None:
        """A process has one such timer: whoever else set it keeps it."""
        if self._has_timer:
            faulthandler.cancel_dump_traceback_later()
            self._has_timer = False

    def _listen(self) -> None:
        """Look for the mark of another rank. Where the disk hangs this thread never comes back, and nobody waits for it."""
        while not self._closed.wait(POLL_S):
            now = time.monotonic()
            section = self._section
            if section is not None and section.is_half_over(now):
                self._mark = self._mark or self._code_of_mark()

    def _code_of_mark(self) -> int | None:
        """The exit code of a rank that hangs; None while none does."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / MARK).read_text(encoding="utf-8"))
        return None

    def end(self, why: str, code: int) -> None:
        """End this process with its stacks on the disk. The disk may be what hangs: then they are on stderr, unless that hangs too."""
        faulthandler.dump_traceback_later(FALLBACK_S, exit=True, file=2)
        stacks = stacks_of_this_process(why)
        is_heard = _say(f"rank {self.rank}: {why}; its stacks are in {self.folder / _name(self.rank)}")
        if not _in_time(lambda: self._leave_stacks(stacks, code), GATHER_S + TELL_S) and is_heard:
            _say(f"{self.folder} does not answer")
            _tell(stacks)
        _exit(code, f"rank {self.rank}")

    def _leave_stacks(self, stacks: bytes, code: int) -> None:
        began = time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _name(self.rank)).write_bytes(stacks)
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
    if _say(why):
        _tell(stacks_of_this_process(why))
    _exit(code, "this process")


def _exit(code: int, who: str) -> None:
    _in_time(lambda: note_exit(code), TELL_S)
    _say(f"{who} ends with exit code {int(code)} ({Exit.describe(code)})")
    os._exit(code)


def _in_time(action: Callable[[], None], limit_s: float) -> bool:
    """Whether it was done, without an error, before the limit; else it is left behind."""
    done = threading.Event()

    def act() -> None:
        with contextlib.suppress(OSError, ValueError):  # ValueError: nobody reads stderr any more
            action()
            done.set()

    thread = threading.Thread(target=act, daemon=True, name="watchdog's last words")
    thread.start()
    thread.join(limit_s)
    return done.is_set()


def stacks_of_this_process(why: str) -> bytes:
    """The stacks of all threads of this process as text, with the threads' names and the reason.

    faulthandler keeps the interpreter while it writes: on a disk that hangs it would keep it for ever. So it writes to memory.
    """
    names = "".join(f"thread 0x{thread.ident or 0:016x}: {thread.name}\n" for thread in threading.enumerate())
    with os.fdopen(os.memfd_create("stacks"), "w+b") as file:
        head = f"{time.strftime('%F %T')} process {os.getpid()} on {os.uname().nodename}: {why}\n{names}\n"
        file.write(head.encode())
        file.flush()
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


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


def _say(line: str) -> bool:
    """A line on stderr. Returns whether it went out in time."""
    return _tell(f"megavlm: {line}\n".encode())


def _tell(text: bytes) -> bool:
    def write() -> None:
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()

    return _in_time(write, TELL_S)
