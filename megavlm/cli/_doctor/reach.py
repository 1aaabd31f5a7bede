"""Whether ranks reach each other, here or between those that torchrun or SLURM started."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from typing import Any

from megavlm.cli._doctor.check import Check
from megavlm.topology.table import human_bytes
from megavlm_launchers.environment import held_port, rank_environment

TIMEOUT_S = 60.0
"""Between ranks of one machine."""
FAR_TIMEOUT_S = 120.0
"""Between those that torchrun or SLURM started: the last may come late."""
_REMEDY = {
    "gloo": "ranks cannot start: look for a firewall, and set GLOO_SOCKET_IFNAME to the interface that the nodes share",
    "nccl": "no training over several GPUs: run again with NCCL_DEBUG=INFO, and see NCCL_SOCKET_IFNAME and NCCL_IB_HCA",
}


def check_here(backend: str, num_ranks: int) -> Check:
    """Start so many ranks on this machine and let them talk."""
    name = f"{backend}, {num_ranks} ranks here"
    with held_port() as port:
        return _check_here(name, backend, num_ranks, port)


def _check_here(name: str, backend: str, num_ranks: int, port: int) -> Check:
    command = [sys.executable, "-m", "megavlm.parallel.reach", backend, str(TIMEOUT_S)]
    ranks = [
        subprocess.Popen(
            command, env=rank_environment(rank, num_ranks, port, os.environ), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(num_ranks)
    ]
    end = time.monotonic() + TIMEOUT_S + 20
    try:
        spoken = [rank.communicate(timeout=max(1.0, end - time.monotonic())) for rank in ranks]
    except subprocess.TimeoutExpired:
        return Check(name, "broken", f"no answer in {TIMEOUT_S + 20:.0f} s", _REMEDY[backend], needed=True)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    bad = [(number, errors) for number, (rank, (_, errors)) in enumerate(zip(ranks, spoken, strict=True)) if rank.returncode]
    if bad:
        number, errors = bad[0]
        said = errors.strip().splitlines() or ["it said nothing"]
        return Check(name, "broken", f"rank {number}: {said[-1][:300]}", _REMEDY[backend], needed=True)
    return _found(name, json.loads(spoken[0][0].strip().splitlines()[-1]))


def check_between(backend: str) -> tuple[Check, bool]:
    """Be one of the ranks that torchrun or SLURM started (their variables are in the environment): (what came out, is this rank 0?)."""
    name = f"{backend}, all {os.environ['WORLD_SIZE']} ranks"
    first = os.environ["RANK"] == "0"
    try:
        from megavlm.parallel.reach import talk

        found = talk(backend, FAR_TIMEOUT_S)
    except Exception as error:  # whatever a network does
        said = (str(error).strip().splitlines() or [""])[0][:300]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return Check(name, "broken", f"rank {os.environ['RANK']}, meeting at {where}: {said}", _REMEDY[backend], needed=True), first
    return _found(name, found), first


def _found(name: str, found: dict[str, Any]) -> Check:
    detail = f"all-reduce is right; met in {found['start_s']:.1f} s, {1e6 * found['latency_s']:.0f} us for a number"
    if found["ranks"] > 1:
        detail += f", {human_bytes(int(found['bytes_per_s']))}/s"
    return Check(name, "ok", detail, needed=True)
