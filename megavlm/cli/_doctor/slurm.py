"""Whether jobs can be submitted from here, and to the partition that is meant."""

from __future__ import annotations

import shutil
import subprocess

from megavlm.cli._doctor.check import Check
from megavlm.config.cluster import ClusterConfig

PROGRAMS = ("sbatch", "srun", "scontrol", "squeue", "scancel")
_TIMEOUT_S = 5.0
_WITHOUT = "`megavlm launch --on slurm` cannot be used from here; `megavlm launch` and torchrun can"


def check_slurm(cluster: ClusterConfig | None) -> Check:
    """SLURM's programs, its controller and, with a cluster's file, its partition."""
    needed = cluster is not None
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return Check("SLURM", "missing", f"not on the PATH: {', '.join(missing)}", _WITHOUT, needed)
    try:
        version = _ask("sinfo", "--version")
        rows = [line.split("|") for line in _ask("sinfo", "--noheader", "--format=%R|%a|%l|%D|%T").splitlines()]
    except (OSError, subprocess.SubprocessError) as error:
        return Check("SLURM", "broken", f"its controller does not answer: {_reason(error)}", _WITHOUT, needed)
    names = list(dict.fromkeys(row[0] for row in rows))
    if cluster is None or cluster.partition is None:
        return Check("SLURM", "ok", f"{version}; partitions: {', '.join(names) or 'none'}")
    wanted = cluster.partition.split(",")
    unknown = [name for name in wanted if name not in names]
    if unknown:
        detail = f"{version}: there is no partition {', '.join(unknown)}; there are {', '.join(names) or 'none'}"
        return Check("SLURM", "broken", detail, "jobs with this cluster file are refused", needed)
    mine = [row for row in rows if row[0] in wanted]
    nodes = sum(int(row[3]) for row in mine)
    down = sum(int(row[3]) for row in mine if row[4].rstrip("*").startswith(("down", "drain", "fail", "maint")))
    detail = f"{version}; partition {cluster.partition} is {mine[0][1]}, time limit {mine[0][2]}, {nodes} nodes, {down} of them down"
    if nodes - down < cluster.nodes or mine[0][1] != "up":
        return Check("SLURM", "note", detail, f"a job of {cluster.nodes} nodes waits until more are up")
    return Check("SLURM", "ok", detail)


def _ask(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True).stdout.strip()


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        return (error.stderr or "").strip().splitlines()[0] if (error.stderr or "").strip() else f"exit code {error.returncode}"
    return f"no answer in {_TIMEOUT_S:.0f} s" if isinstance(error, subprocess.TimeoutExpired) else str(error)
