"""The command line in a forked process: what `subprocess` would show, without paying for the imports of torch and transformers again."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any


def run_command(*arguments: str | Path, timeout_s: float = 200.0) -> tuple[int, str]:
    """(exit code, everything that `megavlm` printed). Raises TimeoutError when it does not end."""
    with tempfile.TemporaryFile() as output:
        process = mp.get_context("fork").Process(target=_run, args=([str(a) for a in arguments], output.fileno()))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutError(f"megavlm {' '.join(map(str, arguments))} did not end within {timeout_s} s")
        output.seek(0)
        return process.exitcode, output.read().decode()


def _run(arguments: list[str], output: int) -> None:
    ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the test session
    os.dup2(output, 1)
    os.dup2(output, 2)
    # A test runner that captures has put its own streams here.
    streams: Any = sys
    streams.stdin, streams.stdout, streams.stderr = open(os.devnull), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    import torch

    from megavlm.cli.main import main

    torch.set_num_threads(1)
    try:
        main(arguments)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
