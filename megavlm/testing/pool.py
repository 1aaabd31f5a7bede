"""A pool of forked gloo ranks, shared by a whole test session.

Starting a rank costs seconds of imports; forking one from a process that has imported torch and megatron-core costs
milliseconds. Each task names a picklable function and a world size; the first `world_size` workers form a process group,
run the function and leave the group again. A worker that hangs is ended, and its stacks are in the error. Where one hung
or died, all are forked anew: others may still be at work on that task.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing as mp
import os
import resource
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import IO, Any

import cloudpickle

from megavlm_launchers.environment import held_port

_QUIT = b"quit"
GRACE_S = 10.0
"""Behind the time limit: by then collectives have raised in the ranks that can say so."""
END_S = 5.0
"""For writing stacks."""


class RankError(AssertionError):
    """A rank raised; the message holds its traceback."""


def _worker(rank: int, connection: Connection, stacks: IO[bytes]) -> None:
    import torch

    ctypes.CDLL("libc.so.6").prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: never outlive the test session
    torch.set_num_threads(1)
    # Not its timer: a process has one, which the watchdog of a run takes for itself.
    faulthandler.enable(stacks)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from megavlm.parallel.context import start_process_group, stop_process_group

    while True:
        try:
            task = connection.recv_bytes()
        except EOFError:
            return
        if task == _QUIT:
            return
        function, args, kwargs, world_size, port, timeout_s = cloudpickle.loads(task)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        try:
            start_process_group(torch.device("cpu"), timeout_s)
            try:
                answer: tuple[bool, Any] = (True, function(*args, **kwargs))
            finally:
                _leave_everything()
                stop_process_group()
        except BaseException:
            answer = (False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        # Modules are reference cycles and hold their process groups. Each group that lingers has a gloo thread that wakes 100 times
        # a second: after some dozens of tasks they would take the whole machine.
        gc.collect()
        connection.send_bytes(cloudpickle.dumps(answer))


def _leave_everything() -> None:
    from megatron.core import parallel_state as ps

    from megavlm.parallel.context import leave_grid

    if ps.model_parallel_is_initialized():
        leave_grid()


class RankPool:
    """Up to `size` forked ranks. `run(f, world_size=n)` calls f on n of them and returns the list of results by rank."""

    def __init__(self, size: int = 8) -> None:
        import megatron.core.dist_checkpointing
        import megatron.core.distributed
        import megatron.core.models.gpt
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel  # noqa: F401

        self._size = size
        self._fork()

    def _fork(self) -> None:
        # What exists already is nothing that a worker could free: its collections need not look at it.
        gc.collect()
        gc.freeze()
        context = mp.get_context("fork")
        self._connections: list[Connection] = []
        self._processes: list[ForkProcess] = []
        self._stacks: list[IO[bytes]] = []
        for rank in range(self._size):
            ours, theirs = context.Pipe()
            self._stacks.append(tempfile.TemporaryFile())  # noqa: SIM115
            # Not daemonic: megatron-core's checkpoint writer starts children of its own.
            process = context.Process(target=_worker, args=(rank, theirs, self._stacks[rank]), daemon=False)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)
        gc.unfreeze()

    def run(self, function: Callable[..., Any], *args: Any, world_size: int = 1, timeout_s: float = 120.0, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on ranks 0..world_size-1. Raises RankError with the first failing rank's traceback."""
        if not self._processes:  # here, and not while that error was handled: every later one would carry it along
            self._fork()
        with held_port() as port:
            task = cloudpickle.dumps((function, args, kwargs, world_size, port, timeout_s))
            try:
                answers = self._exchange(task, world_size, timeout_s)
            except BaseException:
                self._kill()
                raise
        failures = [text for is_good, text in answers if not is_good]
        if failures:
            raise RankError(failures[0])
        return [value for _, value in answers]

    def _exchange(self, task: bytes, world_size: int, timeout_s: float) -> list[tuple[bool, Any]]:
        """Give the task to the first ranks; their answers. Raises RankError where one gives none."""
        connections = self._connections[:world_size]
        for connection in connections:
            connection.send_bytes(task)
        answers: dict[Connection, tuple[bool, Any]] = {}
        end = time.monotonic() + timeout_s + GRACE_S
        while len(answers) < world_size:
            ready = wait([c for c in connections if c not in answers], max(0.0, end - time.monotonic()))
            if not ready:
                silent = [rank for rank, c in enumerate(connections) if c not in answers]
                raise RankError(f"rank {', '.join(map(str, silent))} did not answer within {timeout_s:g} s\n{self._end(silent)}")
            for c in ready:
                assert isinstance(c, Connection)
                try:
                    answers[c] = cloudpickle.loads(c.recv_bytes())
                except EOFError:
                    rank = self._connections.index(c)
                    raise RankError(f"rank {rank} died\n{self._end([rank])}") from None
        return [answers[c] for c in connections]

    def _end(self, ranks: list[int]) -> str:
        """End these workers; their stacks."""
        told = []
        for rank in ranks:
            process = self._processes[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, signal.SIGABRT)
        for rank in ranks:
            self._processes[rank].join(END_S)
            self._processes[rank].kill()  # one that is stopped
            self._stacks[rank].seek(0)
            told.append(f"rank {rank}:\n{self._stacks[rank].read().decode(errors='replace')}")
        return "\n".join(told)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self._connections:
            connection.close()
        for stacks in self._stacks:
            stacks.close()
        self._processes, self._connections, self._stacks = [], [], []

    def close(self) -> None:
        """End every worker."""
        for c in self._connections:
            with contextlib.suppress(OSError):
                c.send_bytes(_QUIT)
            c.close()
        for p in self._processes:
            p.join(timeout=5)
            if p.is_alive():
                p.kill()
                p.join()
