"""Starts the ranks of a run on this machine, and never leaves one behind.

Every rank is a process in a group of its own, so that the terminal's Ctrl-C reaches the launcher alone, which passes it on once. Rank 0
speaks on the terminal; the others write to a file each. The kernel kills the ranks when the launcher dies (PR_SET_PDEATHSIG). Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megavlm.config.exits import Exit
from megavlm_launchers.environment import held_port, rank_environment
from megavlm_launchers.errors import LaunchError

PR_SET_PDEATHSIG = 1
# What the launcher passes on; a closed terminal (HUP) is a request to stop like any other.
FORWARDED = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
}
STOPPING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
WATCHED = {signal.SIGCHLD, *FORWARDED}
LOG_TAIL_LINES = 25
LOG_READ_S = 5.0
"""The disk of the logs may be what hangs: the exit code does not wait for it longer than that."""
HUNG_GRACE_S = 1.0
"""After a hang: ranks that still run have written their stacks, or never will."""


@dataclass
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]
    log: Path | None
    log_start: int
    """Bytes that were in the log before."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative: the signal that ended it."""
        return self.process.returncode

    def send(self, number: signal.Signals) -> None:
        """To the rank and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def reap(self) -> None:
        """Notes that it has ended, if it has. Its helpers are killed first, while its process id cannot be anybody else's yet."""
        if self.exit_code is None and os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            self.send(signal.SIGKILL)
            self.process.wait()

    def end_now(self) -> None:
        if self.exit_code is None:
            self.send(signal.SIGKILL)
            self.process.wait()


@dataclass
class _Group:
    say: Callable[[str], None]
    grace_s: float
    ranks: list[_Rank] = field(default_factory=list)
    failed: _Rank | None = None
    stop_requested: bool = False
    stop_code: int = 0
    """What a rank returns that ended as it was asked to: 128 + signal, or 0."""
    kill_at: float | None = None

    @property
    def alive(self) -> list[_Rank]:
        return [r for r in self.ranks if r.exit_code is None]


def launch_local(
    argv: Sequence[str],
    num_ranks: int,
    env: Mapping[str, str] | None = None,
    *,
    log_dir: str | Path | None = None,
    grace_s: float = 15.0,
    say: Callable[[str], None] | None = None,
) -> int:
    """Runs `argv` in `num_ranks` processes and waits for all of them.

    Args:
        argv: command of every rank.
        env: their environment (default: this process's), to which RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT
            and, unless set, OMP_NUM_THREADS are added.
        log_dir: folder of rank<N>.log with what ranks 1.. write (appended); default: a temporary one.
        grace_s: seconds that the ranks get to end by themselves once one has failed, before SIGKILL.
        say: where the launcher's own words go, a line each; default: stderr.

    Returns:
        0 when every rank returned 0, else the exit code of the rank that failed first (128 + N for one that signal N ended). Ranks that
        return 0 or 128 + N after they were asked to stop by signal N have not failed; the greatest of their codes is returned.

    A first SIGINT, SIGTERM or SIGHUP goes to every rank once and they may take their time (saving a checkpoint); a second one kills.
    Must be called from the main thread of a process without other threads that care for these signals. Raises LaunchError.
    """
    if num_ranks < 1:
        raise LaunchError(f"num_ranks={num_ranks}: at least 1 is needed")
    folder = Path(log_dir) if log_dir is not None else Path(tempfile.mkdtemp(prefix="megavlm-logs-"))
    folder.mkdir(parents=True, exist_ok=True)
    group = _Group(say or _to_stderr, grace_s)
    with _blocked(WATCHED) as mask_before, held_port() as port:
        try:
            _start(group, argv, num_ranks, port, dict(os.environ if env is None else env), folder, mask_before)
            _wait(group)
        finally:
            for rank in group.ranks:
                rank.end_now()  # only after an exception here is any of them still alive
    return _verdict(group)


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"megavlm: {line}\n")
    sys.stderr.flush()


@contextlib.contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[set[int]]:
    """Holds signals back so that `sigtimedwait` can take them one by one: no handler, no race, no polling."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield {int(s) for s in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(group: _Group, argv: Sequence[str], num_ranks: int, port: int, env: dict[str, str], folder: Path, mask: set[int]) -> None:
    prepare = child_setup(os.getpid(), mask)
    for rank in range(num_ranks):
        log = None if rank == 0 else folder / f"rank{rank}.log"
        log_start = log.stat().st_size if log and log.exists() else 0
        with contextlib.ExitStack() as stack:
            out = stack.enter_context(log.open("ab")) if log else None
            process = subprocess.Popen(
                list(argv),
                env=rank_environment(rank, num_ranks, port, env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT if out else None,
                process_group=0,
                preexec_fn=prepare,
            )
        group.ranks.append(_Rank(rank, process, log, log_start))


def child_setup(parent: int, mask: set[int]) -> Callable[[], None]:
    """What a rank does between fork and exec: die with the launcher, and take signals again."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork: loading a library after it may deadlock

    def prepare() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above took hold
            os._exit(1)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return prepare


def _wait(group: _Group) -> None:
    """Until every rank has ended: passes signals on, and ends the others once one has failed."""
    while True:
        _reap(group)
        if not group.alive:
            return
        timeout = 3600.0 if group.kill_at is None else max(0.0, group.kill_at - time.monotonic())
        received = signal.sigtimedwait(WATCHED, timeout)
        if received is not None and received.si_signo != signal.SIGCHLD:
            _forward(group, signal.Signals(received.si_signo))
        elif group.kill_at is not None and time.monotonic() >= group.kill_at:
            numbers = ", ".join(str(r.rank) for r in group.alive)
            group.say(f"killing ranks that did not end within {group.grace_s:g} s: {numbers}")
            _kill(group)


def _reap(group: _Group) -> None:
    """Collects ranks that ended; the first failure gives the others `grace_s` to follow."""
    for rank in group.ranks:
        rank.reap()
    failed = next((r for r in group.ranks if r.exit_code not in (None, 0, group.stop_code)), None)
    if failed is None or group.failed is not None:
        return
    group.failed = failed
    if failed.exit_code in (Exit.HUNG, Exit.SAVE_TIMEOUT):
        group.grace_s = min(group.grace_s, HUNG_GRACE_S)
    group.kill_at = time.monotonic() + group.grace_s
    others = f"; stopping the other {len(group.alive)}" if group.alive and not group.stop_requested else ""
    group.say(f"rank {failed.rank} {_ending(failed)}{others}")
    if not group.stop_requested:  # else they have been told already, and may be in the middle of saving
        for rank in group.alive:
            rank.send(signal.SIGTERM)


def _forward(group: _Group, number: signal.Signals) -> None:
    if number in STOPPING and group.stop_requested:
        group.say("asked twice to stop: killing all ranks")
        _kill(group)
        return
    if number in STOPPING:
        group.stop_requested = True
        group.stop_code = 128 + FORWARDED[number]
        group.say(f"{number.name} passed on to {len(group.alive)} ranks; once more kills them")
    for rank in group.alive:
        rank.send(FORWARDED[number])


def _kill(group: _Group) -> None:
    group.kill_at = None
    for rank in group.alive:
        rank.send(signal.SIGKILL)


def _last_lines(log: Path, start: int) -> list[str]:
    """Of what this start wrote, from byte `start` on: an earlier one's mistakes may be mended."""
    found: list[str] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            found.extend(log.read_bytes()[start:].decode(errors="replace").splitlines()[-LOG_TAIL_LINES:])

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(LOG_READ_S)
    return ["(its disk does not answer)"] if thread.is_alive() else found


def _ending(rank: _Rank) -> str:
    code = rank.process.returncode
    if code >= 0:
        meaning = Exit.describe(code)
        return f"ended with exit code {code}" + (f" ({meaning})" if meaning != "unknown" and code > Exit.USER else "")
    hint = " (out of memory?)" if code == -signal.SIGKILL else ""
    return f"was ended by {_signal_name(-code)}{hint}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def _verdict(group: _Group) -> int:
    first = group.failed
    if first is None:
        return max((r.process.returncode for r in group.ranks), default=0)
    if first.log is not None:
        group.say(f"the end of {first.log}:")
        for line in _last_lines(first.log, first.log_start):
            group.say(f"[rank {first.rank}] {line}")
    code = first.process.returncode
    return code if code > 0 else 128 - code
