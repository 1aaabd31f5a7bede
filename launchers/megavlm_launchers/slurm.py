"""SLURM's variables in torchrun's names: one srun task is one rank."""

from __future__ import annotations

import re
from collections.abc import Mapping

from megavlm_launchers.errors import LaunchError

# Below Linux's ephemeral range (32768 and up), so that no outgoing connection can hold the port already.
FIRST_PORT, NUM_PORTS = 15000, 16000


def slurm_environment(environ: Mapping[str, str]) -> dict[str, str] | None:
    """RANK and its kin for a task of a job step with several tasks; None outside one.

    MASTER_ADDR is the step's first node and MASTER_PORT follows from job, step and restart count, unless they are set.
    """
    if "SLURM_PROCID" not in environ or "SLURM_STEP_ID" not in environ:
        return None
    size = int(environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or 1)
    if size == 1:
        return None
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST") or environ.get("SLURM_NODELIST")
    if not nodes and "MASTER_ADDR" not in environ:
        raise LaunchError("SLURM_PROCID is set but no node list (SLURM_STEP_NODELIST, SLURM_JOB_NODELIST): set MASTER_ADDR")
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(_tasks_here(environ)),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(nodes or ""),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(master_port(environ)),
    }


def inside_batch_script(environ: Mapping[str, str]) -> bool:
    """Whether this is the shell of an sbatch script with several tasks: slurmd sets SLURM_PROCID=0 there too, but no step."""
    return "SLURM_PROCID" in environ and "SLURM_STEP_ID" not in environ and int(environ.get("SLURM_NTASKS") or 1) > 1


def master_port(environ: Mapping[str, str]) -> int:
    """A port that all tasks of a step agree on without talking, and that another job, step or restart on the node does not take."""
    job, step, restart = (int(environ.get(n) or 0) for n in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return FIRST_PORT + (job * 97 + step * 11 + restart) % NUM_PORTS


def first_host(nodes: str) -> str:
    """First host of a SLURM node list: "gpu[03-07,9],login" is gpu03, "a[1-2]b[5-6]" is a1b5."""
    match = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes.strip())
    if match is None:
        raise LaunchError(f"the node list {nodes!r} names no host")
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", match.group())


def tasks_of_node(tasks_per_node: str, node: int) -> int:
    """Tasks on the node with this index: "4(x2),3" is 4, 4, 3. Raises LaunchError when the list is shorter."""
    counts: list[int] = []
    for part in tasks_per_node.split(","):
        count = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if count is None:
            raise LaunchError(f"{tasks_per_node!r} is not a list of tasks per node such as 4(x2),3")
        counts += [int(count.group(1))] * int(count.group(2) or 1)
    if not 0 <= node < len(counts):
        raise LaunchError(f"node {node} is not among the {len(counts)} of the list {tasks_per_node!r}")
    return counts[node]


def _tasks_here(environ: Mapping[str, str]) -> int:
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE")
    return tasks_of_node(listed, int(environ.get("SLURM_NODEID") or 0)) if listed else 1
