"""Signals before, during and after the part of a rank's life that listens to them."""

import signal
import subprocess
import sys
import textwrap

import pytest

RANK = """
    import atexit, os, signal, sys
    import torch
    from megavlm.parallel.context import start_process_group, stop_process_group
    from megavlm.training.signals import StopRequest
    number = int(sys.argv[1])
    start_process_group(torch.device("cpu"), 60)
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), number)
        print("heard", stop.agreed(torch.device("cpu"))[0], flush=True)
    stop_process_group()
    atexit.register(lambda: os.kill(os.getpid(), number))
    os.kill(os.getpid(), number)
    print("uploaded", flush=True)
"""


@pytest.mark.parametrize(("number", "code", "said"), [(signal.SIGUSR1, 0, True), (signal.SIGUSR2, 0, True), (signal.SIGTERM, -15, False)])
def test_one_warning_and_many_are_the_same(number: signal.Signals, code: int, said: bool) -> None:
    """A SLURM job repeats its warning until the ranks have ended: one that comes behind training must not break the model's upload."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(RANK), str(int(number))], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == code, done.stderr
    assert done.stdout.split() == ["heard", str(int(number)), *(["uploaded"] if said else [])]
