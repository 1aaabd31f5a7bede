"""A save that hangs ends the process; one that does not leaves no trace."""

from __future__ import annotations

import subprocess
import sys
import threading

from megavlm.checkpoint.watchdog import EXIT_CODE, watchdog


def test_a_hung_save_ends_the_process_and_says_why() -> None:
    code = "import time\nfrom megavlm.checkpoint.watchdog import watchdog\nwith watchdog('saving X', 0.2): time.sleep(30)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25, check=False)
    assert done.returncode == EXIT_CODE
    assert "saving X took longer than checkpoint.timeout_s=0.2 s" in done.stderr
    assert "Thread" in done.stderr, "the stack shows where it hung"


def test_a_save_in_time_leaves_no_timer() -> None:
    before = threading.active_count()
    with watchdog("saving", 60.0):
        pass
    for thread in threading.enumerate():
        if isinstance(thread, threading.Timer):
            thread.join(timeout=5)
    assert threading.active_count() <= before
