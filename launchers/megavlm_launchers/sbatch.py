"""The script of a SLURM job: rendered from templates/train.sbatch, submitted with sbatch."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from megavlm.config.cluster import ClusterConfig, ContainerConfig
from megavlm.config.exits import Exit
from megavlm_launchers.errors import LaunchError

TEMPLATES = Path(__file__).parent / "templates"
REQUEUE_S = 20
"""What the script keeps of the time between the warning and the limit, to kill ranks that do not end and go back into the queue."""
TELL_S = 5
"""Until they have ended, the ranks are told that often to save and end."""
AWAY_S = 60
"""What the script waits before it starts ranks again that could not read any checkpoint: until a file server may be back."""
AWAY_STARTS = 10
"""So many such starts in a row are not counted as restarts that got nowhere."""
FINAL = (Exit.USER, Exit.FAULTS_EXHAUSTED, Exit.REPLICAS_DIVERGED, Exit.DISK_FULL)
"""Exit codes of ranks that a restart would meet again: somebody has to look."""


@dataclass(frozen=True)
class SlurmJob:
    """All that the script of one run says."""

    name: str
    cluster: ClusterConfig
    command: Sequence[str]
    """What every rank runs."""
    run_dir: Path
    """Whole path, seen by all nodes."""
    workdir: Path
    """Where paths in the recipe begin."""
    env_file: Path | None = None
    """NAME=value a line, read when the job starts: secrets stay out of the script, which SLURM shows to others."""
    chain: int | None = None
    """So many jobs one after the other, as an array, instead of one that goes back into the queue."""
    local_dir: Path | None = None
    """A folder that every node has for itself, whole path: made there before a container is entered, and mounted in it."""


def render(job: SlurmJob) -> str:
    """The script. Raises LaunchError for what no SLURM script can say."""
    paths = {"run.dir": job.run_dir, "the folder of the submission": job.workdir, "checkpoint.local.dir": job.local_dir}
    for what, text in {**{what: str(path) for what, path in paths.items()}, "run.name": job.name}.items():
        if "\n" in text or "\0" in text:
            raise LaunchError(f"{what} has a line break in it: {text!r}")
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.filters["q"] = lambda value: shlex.quote(str(value))
    cluster = job.cluster
    return environment.get_template("train.sbatch").render(
        directives=_directives(job),
        exits={"user": int(Exit.USER), "fruitless": int(Exit.NO_PROGRESS), "unreadable": int(Exit.UNREADABLE)},
        away_s=AWAY_S,
        away_starts=AWAY_STARTS,
        final={int(code): code.meaning for code in FINAL},
        fruitless=cluster.max_fruitless_restarts,
        workdir=job.workdir,
        run_dir=job.run_dir,
        chain=job.chain,
        requeue=cluster.requeue,
        env=sorted({"PYTHONUNBUFFERED": "1", **cluster.env}.items()),
        env_file=job.env_file,
        setup=cluster.setup,
        signal=cluster.signal,
        tell_s=TELL_S,
        local_dir=job.local_dir if job.cluster.container is not None else None,
        patience=max(cluster.signal_before_s - REQUEUE_S, cluster.signal_before_s // 2),
        srun=shlex.join(_srun_options(job)),
        command=shlex.join([*_entered(job), *job.command]),
    )


def _directives(job: SlurmJob) -> list[str]:
    cluster = job.cluster
    options = [
        f"--job-name={re.sub(r'[^A-Za-z0-9._+-]+', '_', job.name)}",
        f"--nodes={cluster.nodes}",
        f"--ntasks-per-node={cluster.ranks}",
        *([f"--cpus-per-task={cluster.cpus_per_rank}"] if cluster.cpus_per_rank else []),
        *_gpus(cluster),
        *([f"--mem={cluster.memory_per_node}"] if cluster.memory_per_node else []),
        *(["--exclusive"] if cluster.exclusive else []),
        f"--time={cluster.time}",
        f"--signal=B:{cluster.signal}@{cluster.signal_before_s}",
        "--requeue" if cluster.requeue and job.chain is None else "--no-requeue",
        "--open-mode=append",
        f"--output={job.run_dir.as_posix().replace('%', '%%')}/slurm/{'%A_%a' if job.chain else '%j'}.log",
        *([f"--array=1-{job.chain}%1"] if job.chain else []),
        *(f"--{name}={value}" for name in ("partition", "account", "qos") if (value := getattr(cluster, name))),
        *cluster.sbatch_options,
    ]
    return [_directive(option) for option in options]


def _directive(option: str) -> str:
    """As sbatch reads its lines: within double quotes everything but they and the backslash stands for itself."""
    if re.fullmatch(r"[A-Za-z0-9_./:,=+@%\[\]-]+", option):
        return option
    name, equals, value = option.partition("=")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{name}{equals}"{escaped}"'


def _gpus(cluster: ClusterConfig) -> list[str]:
    if not cluster.gpus_per_node or cluster.gpu_request == "none":
        return []
    kind = f"{cluster.gpu_type}:" if cluster.gpu_type else ""
    if cluster.gpu_request == "gres":
        return [f"--gres=gpu:{kind}{cluster.gpus_per_node}"]
    return [f"--gpus-per-node={kind}{cluster.gpus_per_node}"]


def _srun_options(job: SlurmJob) -> list[str]:
    """One failed rank ends the others; the first may export and upload when they have ended; each line of output says whose it is."""
    cluster = job.cluster
    options = ["--kill-on-bad-exit=1", "--wait=0", "--label"]
    if cluster.cpus_per_rank:
        options.append(f"--cpus-per-task={cluster.cpus_per_rank}")  # since SLURM 22.05 a step does not take the job's
    if cluster.container is not None and cluster.container.runtime == "pyxis":
        mounts = ",".join(_mounts(job, cluster.container))
        options += [f"--container-image={cluster.container.image}", f"--container-mounts={mounts}", f"--container-workdir={job.workdir}"]
    return [*options, *cluster.srun_options]


def _entered(job: SlurmJob) -> list[str]:
    """What every task runs first to be inside the container."""
    container = job.cluster.container
    if container is None or container.runtime != "apptainer":
        return []
    nvidia = ["--nv"] if job.cluster.gpus_per_node else []
    binds = [option for mount in _mounts(job, container) for option in ("--bind", mount)]
    return ["apptainer", "exec", *nvidia, *binds, "--pwd", str(job.workdir), container.image]


def _mounts(job: SlurmJob, container: ContainerConfig) -> list[str]:
    folders = [job.workdir, job.run_dir, *([job.local_dir] if job.local_dir is not None else [])]
    own = dict.fromkeys(map(str, folders))
    for folder in own:
        if ":" in folder or "," in folder:
            raise LaunchError(f"{folder} has a colon or a comma in it, and cannot be mounted in a container: take another folder")
    return [*(f"{folder}:{folder}" for folder in own), *container.mounts]


def submit(script: Path) -> str:
    """The number of the job. Raises LaunchError where sbatch is missing or refuses."""
    if shutil.which("sbatch") is None:
        raise LaunchError("there is no sbatch here: run this on a login node of the cluster, or with --dry-run to see the script")
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LaunchError(f"sbatch refuses {script}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout.strip().split(";")[0]
