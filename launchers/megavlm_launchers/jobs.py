"""The runs that were launched from here: a small file each, and what SLURM and the run's own folder say of them. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from megavlm.tracking.goodput import measure
from megavlm.tracking.metrics import METRICS_FILE, MetricsError
from megavlm_launchers.errors import LaunchError

FOLDER_VARIABLE = "MEGAVLM_JOBS"
ENDED = "ENDED"


@dataclass(frozen=True)
class Job:
    """One launch."""

    id: str
    """SLURM's number, or local-<process id>."""
    on: str
    """slurm or local."""
    name: str
    run_dir: str
    launched_at: float
    """Seconds since 1970."""
    script: str | None = None
    """What `sbatch` was given."""
    signal: str = "USR2"
    """What asks its script to save and end."""

    @property
    def log(self) -> Path:
        """The newest file with what its ranks wrote."""
        folder = Path(self.run_dir) / ("slurm" if self.on == "slurm" else "logs")
        found = sorted(folder.glob(f"{self.id}*.log" if self.on == "slurm" else "*.log"), key=lambda path: path.stat().st_mtime)
        if not found:
            raise LaunchError(f"job {self.id} has not written anything yet (its log will be in {folder})")
        return found[-1]

    @property
    def notes(self) -> Path:
        """The folder of the script's own notes."""
        return Path(self.run_dir) / "slurm" / self.id


@dataclass(frozen=True)
class Progress:
    """What a run's folder tells."""

    step: int
    steps: int | None
    """None: the recipe cannot be read."""
    checkpoint: str | None
    effective: float | None
    """Seconds in steps that were kept over seconds since the first start; None before the first step."""


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the files lie: $MEGAVLM_JOBS, or megavlm/jobs in the user's state folder."""
    if environ.get(FOLDER_VARIABLE):
        return Path(environ[FOLDER_VARIABLE])
    state = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "megavlm" / "jobs"


def remember(job: Job) -> None:
    place = folder()
    place.mkdir(parents=True, exist_ok=True)
    partial = place / f".{job.id}.tmp"
    partial.write_text(json.dumps(asdict(job), indent=1) + "\n", encoding="utf-8")
    partial.replace(place / f"{job.id}.json")


def known() -> list[Job]:
    """Oldest first; files that are no jobs are passed over."""
    found = []
    for path in folder().glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append(Job(**json.loads(path.read_text(encoding="utf-8"))))
    return sorted(found, key=lambda job: job.launched_at)


def find(id: str) -> Job:
    """By its number, or the run's name when one job alone has it. Raises LaunchError naming what there is."""
    jobs = known()
    exact = [job for job in jobs if job.id == id]
    named = exact or [job for job in jobs if job.name == id]
    if not named:
        there = ", ".join(job.id for job in jobs[-10:]) or "none"
        raise LaunchError(f"no job {id} was launched from here (the last ones: {there})")
    if len(named) > 1:
        raise LaunchError(f"{len(named)} jobs have the name {id}: say which, {', '.join(job.id for job in named)}")
    return named[0]


def state(job: Job) -> str:
    """SLURM's word for it (PENDING, RUNNING, COMPLETED, ...); RUNNING or ENDED for a local one and for what SLURM has forgotten."""
    if job.on == "local":
        return "RUNNING" if _runs_still(job) else ENDED
    if shutil.which("squeue") is None:
        return "UNKNOWN"
    command = ["squeue", f"--jobs={job.id}", "--states=all", "--noheader", "--format=%T|%r"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return ENDED if "nvalid job id" in done.stderr else "UNKNOWN"
    lines = [line.strip().partition("|") for line in done.stdout.splitlines() if line.strip()]
    for wanted in ("RUNNING", "COMPLETING", "PENDING"):
        for word, _, reason in lines:
            if word == wanted:
                return f"{word} ({reason})" if wanted == "PENDING" and reason not in ("", "None") else word
    return lines[-1][0] if lines else ENDED


def _runs_still(job: Job) -> bool:
    """Whether the process is there, and is the one that was launched and no later one with its number."""
    pid = job.id.rpartition("-")[2]
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        up = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return False
    started = time.time() - up + ticks / os.sysconf("SC_CLK_TCK")
    return started <= job.launched_at + 1


def progress(job: Job) -> Progress:
    """From the run's recipe, its metrics and its newest checkpoint."""
    run_dir = Path(job.run_dir)
    checkpoint = None
    with contextlib.suppress(OSError):
        checkpoint = (run_dir / "checkpoints" / "latest").read_text(encoding="utf-8").strip()
    found = None
    with contextlib.suppress(OSError, MetricsError):
        until = None if is_there(state(job)) else (run_dir / METRICS_FILE).stat().st_mtime
        found = measure(run_dir, begun=_first_start(job), until=until)
    effective = None if found is None else found.share
    return Progress(0 if found is None else found.last_step, _all_steps(run_dir), checkpoint, effective)


def _first_start(job: Job) -> float:
    with contextlib.suppress(OSError, ValueError):
        return float((job.notes / "first_start").read_text())
    return job.launched_at


def _all_steps(run_dir: Path) -> int | None:
    try:
        recipe: Any = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
        return sum(int(stage["steps"]) for stage in recipe["stages"])
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def stop(job: Job, *, now: bool = False) -> str:
    """Ask the ranks to save and end, and see to it that nothing starts again; `now`: end them without. Returns what was done, in words."""
    if job.on == "local":
        if not _runs_still(job):
            raise LaunchError(f"job {job.id} has ended")
        os.kill(int(job.id.rpartition("-")[2]), signal.SIGKILL if now else signal.SIGTERM)
        return "killed" if now else "asked to save and end"
    word = state(job)
    if not is_there(word):
        raise LaunchError(f"job {job.id} is not there to be stopped: it is {word}")
    job.notes.mkdir(parents=True, exist_ok=True)
    (job.notes / "stop").touch()
    # Of a chain one runs, under a number of its own, and the others wait.
    running = _slurm("squeue", f"--jobs={job.id}", "--states=RUNNING", "--noheader", "--format=%A").split()
    if now or not running:
        _slurm("scancel", job.id)
        return "cancelled"
    for number in running:
        # Its exit code tells nothing: it is not 0 either when the job has got the signal and ended before scancel looked again.
        _slurm("scancel", "--batch", f"--signal={job.signal}", number, check=False)
    return "asked to save and end; `--now` does not wait for a checkpoint"


def is_there(word: str) -> bool:
    """Whether a job in this state runs or will."""
    return word.startswith(("RUNNING", "PENDING", "COMPLETING", "REQUEUE"))


def _slurm(*command: str, check: bool = True) -> str:
    """What it prints. Raises LaunchError where it is missing or fails."""
    if shutil.which(command[0]) is None:
        raise LaunchError(f"there is no {command[0]} here: run this on a login node of the cluster")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise LaunchError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
