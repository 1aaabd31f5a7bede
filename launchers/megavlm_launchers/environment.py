"""Which rank of which group this process is, told by environment variables; and how many ranks this machine has room for.

torchrun's names (RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT) are what the rest of megavlm reads.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from megavlm_launchers.errors import LaunchError
from megavlm_launchers.slurm import inside_batch_script, slurm_environment

LOOPBACK = "127.0.0.1"


def found_ranks(environ: Mapping[str, str]) -> dict[str, str] | None:
    """The variables of the rank that this process already is, in torchrun's names; None when nobody started it as a rank.

    torchrun's own variables come first, then srun's. Raises LaunchError for half a set, and for the bare shell of an sbatch script that
    asked for several tasks, where every task would otherwise wait for peers that nobody started.
    """
    if "RANK" in environ or "WORLD_SIZE" in environ:
        missing = [n for n in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if n not in environ]
        if missing:
            raise LaunchError(f"RANK or WORLD_SIZE is set but {', '.join(missing)} is not: set all four (torchrun does), or unset both")
        rank, size = _whole(environ, "RANK"), _whole(environ, "WORLD_SIZE")
        if not 0 <= rank < size:
            raise LaunchError(f"RANK={rank} is not below WORLD_SIZE={size}")
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        local = {"LOCAL_RANK": environ.get("LOCAL_RANK", "0"), "LOCAL_WORLD_SIZE": environ.get("LOCAL_WORLD_SIZE", "1")}
        return {n: environ[n] for n in names} | local
    if inside_batch_script(environ):
        tasks = environ["SLURM_NTASKS"]
        raise LaunchError(f"this is the shell of an sbatch script with {tasks} tasks: write `srun megavlm train ...`, or give --nproc")
    return slurm_environment(environ)


def rank_environment(rank: int, num_ranks: int, port: int, environ: Mapping[str, str]) -> dict[str, str]:
    """`environ` for one of `num_ranks` ranks on this machine.

    OMP_NUM_THREADS becomes cores / ranks unless set: with every rank using all cores, two ranks run slower than one.
    """
    threads = environ.get("OMP_NUM_THREADS") or str(max(1, num_cores() // num_ranks))
    return {
        **environ,
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": threads,
    }


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A free TCP port of the loopback address, kept from everybody who asks the system for one until the block ends.

    Rank 0 listens on it seconds after it was chosen, behind Python's imports: another run on this machine must not be given it meanwhile.
    On Linux an address may be bound again with SO_REUSEADDR, which torch's store sets, while nobody listens there (socket(7)), and is
    never given out by itself. Elsewhere the port is free when it is chosen, and no more.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind((LOOPBACK, 0))
        port = int(held.getsockname()[1])
        if sys.platform != "linux":
            held.close()
        yield port


def num_visible_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that a process with this environment would see, without importing torch (which takes seconds, and makes threads)."""
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [n.strip() for n in listed.split(",")]
        return len(names[: names.index("-1")] if "-1" in names else [n for n in names if n])
    try:
        found = len(list(Path("/proc/driver/nvidia/gpus").iterdir()))
    except OSError:
        found = 0
    return found or _gpus_of_nvidia_smi()


def _gpus_of_nvidia_smi() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        done = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0


def _whole(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise LaunchError(f"{name}={environ[name]!r} in the environment is not a whole number") from None
