"""Ranks that hang: every rank leaves its stacks, the right exit code comes back in time, and nothing is left behind."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megavlm.config.exits import Exit
from megavlm.parallel.watchdog import FALLBACK_S
from megavlm.testing.hung_disk import HungDisk, can_hang

LIMIT_S = 2.0
MARK = "MEGAVLM_TEST_HANGS"
SLACK_S = 10.0
"""For a busy machine; what is promised on a quiet one is limit + 5 s."""
RANK = f"""
import ctypes, os, signal, sys, time
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from megavlm.parallel.watchdog import Watchdog

def sleeping(): time.sleep(600)
def stopped(): os.kill(os.getpid(), signal.SIGSTOP)
def deaf():
    time.sleep(1)  # the watchdog hears of the section
    ctypes.PyDLL(None).sleep(600)  # keeps the interpreter

rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
with Watchdog(Path(sys.argv[1]), rank, size) as dog:
    dog.enter("setup", 120, "setup_s")
    dist.init_process_group("gloo", timeout=timedelta(seconds=600))
    for step in range(2):
        dog.enter("a step", {LIMIT_S}, "step_s")
        with dog.during("an evaluation", 60, "evaluation_s"):
            time.sleep(0.1)
        hangs = sys.argv[2].split(",")[rank]
        if hangs and step == 1:
            print("HANGS", time.time(), file=sys.stderr, flush=True)
            globals()[hangs]()
        dist.all_reduce(torch.ones(1))
"""
LAUNCHER = """
import sys
from megavlm_launchers.local import launch_local
sys.exit(launch_local([sys.executable, "-c", sys.argv[1], sys.argv[2], sys.argv[3]], int(sys.argv[4]), log_dir=sys.argv[5]))
"""


class Hang:
    """A launch that hung, and what became of it."""

    def __init__(self, hangs: list[str], folder: Path) -> None:
        num_ranks = len(hangs)
        self.stacks = folder / "stacks"
        command = [sys.executable, "-c", LAUNCHER, RANK, str(self.stacks), ",".join(hangs), str(num_ranks), str(folder / "logs")]
        environment = os.environ | {MARK: str(folder), "MEGAVLM_EXIT_NOTE": str(folder / "note")}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        self.code, end = done.returncode, time.time()
        logs = [path.read_text() for path in sorted((folder / "logs").glob("*.log"))] if num_ranks > 1 else []
        self.said = "\n".join([done.stderr, *logs])
        began = float(self.said.split("HANGS ")[1].split()[0])
        self.seconds = end - began
        self.orphans = [p.pid for p in psutil.process_iter() if _environment(p).get(MARK) == str(folder)]
        self.note = (folder / "note").read_text().strip() if (folder / "note").exists() else ""


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return dict(process.environ())
    except psutil.Error:
        return {}


def test_a_sleeping_and_a_stopped_rank(tmp_path: Path) -> None:
    """One sleeps, one is stopped and can do nothing, and the third waits for them in a collective, in C++."""
    hang = Hang(["", "sleeping", "stopped"], tmp_path)
    assert hang.code == Exit.HUNG and hang.note == "77", hang.said
    assert "in sleeping" in (hang.stacks / "rank-1.txt").read_text()
    assert "all_reduce" in (hang.stacks / "rank-0.txt").read_text()
    assert not (hang.stacks / "rank-2.txt").exists()
    assert "a step takes longer than step_s=2 s" in hang.said
    assert "no stacks from rank 2: stopped" in hang.said
    assert LIMIT_S < hang.seconds < LIMIT_S + SLACK_S and not hang.orphans


@pytest.mark.slow
def test_a_rank_that_keeps_the_interpreter(tmp_path: Path) -> None:
    """No Python runs in it any more, the watchdog's thread included."""
    hang = Hang(["deaf"], tmp_path)
    assert hang.code == 1, hang.said
    assert "in deaf" in hang.said and "Timeout" in hang.said
    assert LIMIT_S + FALLBACK_S - 0.5 < hang.seconds < LIMIT_S + FALLBACK_S + SLACK_S and not hang.orphans


def test_what_does_not_hang_is_left_alone(tmp_path: Path) -> None:
    """Each section has its own time, one inside another does not count for the outer one, and after the end nothing is watched."""
    code = """
import sys, time
from pathlib import Path
from megavlm.parallel import watchdog
watchdog.FALLBACK_S = 0.5
with watchdog.Watchdog(Path(sys.argv[1]), 0, 1) as dog:
    dog.enter("a step", 3.0, "step_s")
    time.sleep(1.6)
    with dog.during("a checkpoint", 30, "timeout_s"):
        time.sleep(3.1)
    time.sleep(1.6)
    dog.enter("a step", 0.8, "step_s")
    dog.enter("free", None, "")
    time.sleep(1.2)
    dog.enter("a step", 0.8, "step_s")
time.sleep(1.5)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "stacks")], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


SAVING = """
import sys, time
from pathlib import Path
from megavlm.parallel import watchdog
with watchdog.Watchdog(Path(sys.argv[1]), 0, 1) as dog:
    dog.enter("a checkpoint", 1.2, "checkpoint.timeout_s", 76)
    def saving(): time.sleep(60)
    saving()
"""


def save_and_hang(folder: Path) -> subprocess.CompletedProcess[str]:
    """A process that hangs in a save; `folder` is where its stacks and the marks of others are."""
    return subprocess.run([sys.executable, "-c", SAVING, str(folder)], capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("file", ["hang", "rank-0.txt"])
def test_a_file_that_hangs_does_not_keep_the_stacks_and_the_exit_code(file: str, tmp_path: Path) -> None:
    """It is a pipe's end, with nobody at the other: whoever opens it waits for ever."""
    folder = tmp_path / "stacks"
    folder.mkdir()
    os.mkfifo(folder / file)
    done = save_and_hang(folder)
    assert done.returncode == Exit.SAVE_TIMEOUT, done.stderr
    assert "in saving" in done.stderr + ((folder / "rank-0.txt").read_text() if file == "hang" else "")
    assert ("does not answer" in done.stderr) == (file == "rank-0.txt")


def test_a_disk_that_hangs_does_not_keep_the_stacks_and_the_exit_code(tmp_path: Path) -> None:
    """A real one: whoever looks for any file on it waits in the kernel."""
    if not can_hang(tmp_path):
        pytest.skip("this process may not mount a file system of FUSE")
    start = time.monotonic()
    with HungDisk(tmp_path):
        done = save_and_hang(tmp_path / "run" / "stacks")
    assert done.returncode == Exit.SAVE_TIMEOUT, done.stderr
    assert "does not answer" in done.stderr and "in saving" in done.stderr
    assert time.monotonic() - start < 1.2 + FALLBACK_S + SLACK_S


def test_a_terminal_that_hangs_does_not_keep_the_exit_code(tmp_path: Path) -> None:
    """stderr is a pipe that is full: whoever writes to it waits for ever, faulthandler with the interpreter in its hand."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, bytes(65536))
    os.set_blocking(writing, True)
    with subprocess.Popen([sys.executable, "-c", SAVING, str(tmp_path)], stderr=writing) as process:
        try:
            assert process.wait(1.2 + FALLBACK_S + SLACK_S + 10) == Exit.SAVE_TIMEOUT
        finally:
            process.kill()
            os.close(reading)
            os.close(writing)
    assert "in saving" in (tmp_path / "rank-0.txt").read_text()


def test_a_section_that_begins_while_the_clock_is_read_is_not_overdue(tmp_path: Path) -> None:
    """The thread loses the processor for longer than a section may take, each time that it reads the clock."""
    code = """
import sys, threading, time
from pathlib import Path
from megavlm.parallel import watchdog
read = time.monotonic
def slow():
    before = read()
    if threading.current_thread().name == "watchdog":
        time.sleep(1.0)
    return read() if is_lost_before else before
for is_lost_before in (False, True):
    watchdog.time.monotonic = slow
    with watchdog.Watchdog(Path(sys.argv[1]), 0, 1) as dog:
        end = read() + 2.2
        while read() < end:
            dog.enter("a step", 0.8, "step_s")
            time.sleep(0.05)
    watchdog.time.monotonic = read
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "stacks")], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_timer_of_others_is_left_to_them(tmp_path: Path) -> None:
    code = """
import faulthandler, sys, time
from pathlib import Path
from megavlm.parallel.watchdog import Watchdog
faulthandler.dump_traceback_later(1.5, exit=True)
with Watchdog(Path(sys.argv[1]), 0, 1) as dog:
    dog.enter("free", None, "")
    time.sleep(0.6)
def theirs(): time.sleep(20)
theirs()
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "stacks")], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1 and "in theirs" in done.stderr, done.stderr
