"""Ranks beside this process: it becomes rank 0 of a group whose other ranks are started here, so that it keeps the terminal to itself.

For commands that a person talks to. `local.launch_local` is for runs: it starts all ranks and only watches.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megavlm_launchers.environment import held_port, rank_environment
from megavlm_launchers.errors import LaunchError
from megavlm_launchers.local import child_setup

GRACE_S = 15.0


@contextlib.contextmanager
def companions(argv: Sequence[str], num_ranks: int, env: Mapping[str, str] | None = None) -> Iterator[dict[str, str]]:
    """Start `argv` as ranks 1 .. num_ranks - 1 and give the environment of rank 0, which the caller is to be.

    The others write to a file each and read nothing. When the block ends well they get `GRACE_S` to end too; when it ends in an exception,
    or this process dies, they are killed. Raises LaunchError when one of them had failed although this rank had not.
    """
    if num_ranks < 1:
        raise LaunchError(f"num_ranks={num_ranks}: at least 1 is needed")
    environ = dict(os.environ if env is None else env)
    folder = Path(tempfile.mkdtemp(prefix="megavlm-ranks-"))
    prepare = child_setup(os.getpid(), set())
    processes: list[subprocess.Popen[bytes]] = []
    with held_port() as port:
        try:
            for rank in range(1, num_ranks):
                with (folder / f"rank{rank}.log").open("wb") as log:
                    processes.append(
                        subprocess.Popen(
                            list(argv),
                            env=rank_environment(rank, num_ranks, port, environ),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            process_group=0,
                            preexec_fn=prepare,
                        )
                    )
            yield rank_environment(0, num_ranks, port, environ)
            for rank, process in enumerate(processes, start=1):
                code = _ending(process)
                if code:
                    raise LaunchError(f"rank {rank} ended with exit code {code}; what it wrote: {folder / f'rank{rank}.log'}")
        finally:
            for process in processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _ending(process: subprocess.Popen[bytes]) -> int:
    try:
        return process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        return 0
