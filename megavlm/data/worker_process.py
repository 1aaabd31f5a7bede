"""What a data worker process runs: packs come in, batches go out, until the other side closes.

Started by `megavlm.data.workers` as a plain Python process with one socket. It never outlives its parent: the kernel kills it when the
parent ends, and a closed socket ends it as well.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megavlm.data.materialise import Materialiser
    from megavlm.data.types import SampleRef
    from megavlm.data.workers import WorkerSetup

_PR_SET_PDEATHSIG = 1
_FOR_THE_PARENT = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Schedulers and terminals send these to every process; the run alone decides what follows."""


def main() -> None:
    """Serve the socket whose descriptor is the first argument; the second is the parent's process id."""
    for number in _FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    pipe = Connection(int(sys.argv[1]))
    try:
        _die_with(int(sys.argv[2]))
        try:
            setup: WorkerSetup = pickle.loads(pipe.recv_bytes())
            materialise = setup.open()
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            _send_error(pipe, error)
            return
        pipe.send(("ready", None))
        while True:
            _serve(pipe, materialise)
    except (EOFError, ConnectionError):  # the parent closed its end
        pass


def _serve(pipe: Connection, materialise: Materialiser) -> None:
    from megavlm.data.batch_memory import write_batch

    packs, names_samples = pickle.loads(pipe.recv_bytes())

    def tell(ref: SampleRef) -> None:
        pipe.send(("at", ref))

    try:
        description, file = write_batch(materialise(packs, tell if names_samples else None))
    except (EOFError, ConnectionError):
        raise
    except Exception as error:
        _send_error(pipe, error)
        return
    try:
        pipe.send(("done", description))
        send_handle(pipe, file, os.getppid())
    finally:
        os.close(file)


def _send_error(pipe: Connection, error: Exception) -> None:
    text = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # an exception class with a constructor of its own: its text must do
        error = RuntimeError(f"{type(error).__name__}: {error}")
    pipe.send(("error", (error, text)))


def _die_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise EOFError("the parent ended before the kernel was told")
