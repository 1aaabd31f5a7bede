"""A real SLURM of several nodes on this machine: munge, controller and a daemon for each node, all in one folder, up in seconds.

Nodes are daemons that listen on ports of 127.0.0.1; what GPUs they claim are devices like /dev/null. Needs slurm-wlm, munge and root.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]

PORTS = (20000, 32000)
FIRST_JOBS = (1, 1_000_000)
"""Clusters of tests share a machine: a job's number is what tells its processes and its ranks' port from those of another cluster."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol")
_CONFIGURATION = """
ClusterName=megavlm
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
FirstJobId={first_job}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000
SlurmdParameters=config_overrides
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout={lost_after}
KillWait={kill_wait}
MinJobAge=3600
MailProg=/bin/true
JobRequeue=1
GresTypes=gpu
PartitionName=debug Nodes=node[1-{nodes}] Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """What a cluster needs and this machine lacks, in words; none when it can start."""
    os.environ["PATH"] = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name) is None] + ([] if os.geteuid() == 0 else ["root"])


class SlurmCluster:
    """Started by `with`; every process it started is ended behind it."""

    def __init__(self, nodes: int = 2, gpus: int = 0, *, lost_after_s: int = 10, kill_wait_s: int = 5) -> None:
        # Of its own, for a test's is too long: a step listens on a socket in it, whose path may have 108 bytes.
        self.folder, self.nodes = Path(tempfile.mkdtemp(prefix="slurm-")), nodes
        self.configuration = self.folder / "slurm.conf"
        self._gpus, self._times = gpus, (lost_after_s, kill_wait_s)
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self.configuration)}

    def __enter__(self) -> SlurmCluster:
        self._write()
        try:
            key, socket = self.folder / "munge.key", self.folder / "munge.socket"
            key.touch(mode=0o600)
            key.write_bytes(os.urandom(1024))
            files = {"key-file": key, "socket": socket, "pid-file": self.folder / "munged.pid", "seed-file": self.folder / "munged.seed"}
            self._start("munged", "munged", "-F", "-f", "--num-threads=2", *(f"--{name}={path}" for name, path in files.items()))
            _until(socket.exists, 10, "munged did not open its socket")
            self.start_controller()
            for number in range(1, self.nodes + 1):
                self.start_node(number)
            _until(lambda: self._all_idle(self.nodes), 30, "the nodes did not come up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start_controller(self) -> None:
        self._start("slurmctld", "slurmctld", "-D", "-f", str(self.configuration))

    def start_node(self, number: int) -> None:
        self._start(f"node{number}", "slurmd", "-D", "-N", f"node{number}", "-f", str(self.configuration))

    def kill(self, daemon: str) -> None:
        """SIGKILL to munged, slurmctld or node<N> alone: what a node ran goes on."""
        self._daemons.pop(daemon).kill()

    def kill_machine(self, number: int) -> None:
        """SIGKILL to all that makes up a node, within a moment: its daemon, its steps, what they run."""
        tasks = [p for p in self._processes() if p.info["environ"].get("SLURMD_NODENAME") == f"node{number}"]
        steps = {parent for task in tasks if (parent := task.parent()) is not None and parent.name().startswith("slurmstepd")}
        self._daemons.pop(f"node{number}").kill()
        for process in [*steps, *tasks]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def run(self, *command: str, check: bool = True) -> str:
        """What one of SLURM's programs prints."""
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def state(self, job: str) -> dict[str, str]:
        """What `scontrol show job` knows, by field."""
        words = self.run("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, states: set[str], timeout_s: float = 60) -> dict[str, str]:
        """Until the job is in one of `states`."""
        _until(lambda: self.state(job)["JobState"] in states, timeout_s, lambda: f"job {job} is {self.state(job)['JobState']}")
        return self.state(job)

    def start_requeued(self, job: str, timeout_s: float = 60, without: int | None = None) -> None:
        """Start a job that went back into the queue two seconds after its nodes are free, where SLURM holds it for two minutes.

        `without`: a node that died.

        Not at once: a node refuses what starts in the second in which it was told to forget the job ("Job credential revoked"), and that
        ends the job for good.
        """

        def has_started() -> bool:
            # SLURM's hold begins when the job's last process has ended: a word before that is forgotten.
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
            return self.state(job)["JobState"] in ("RUNNING", "COMPLETING", "COMPLETED", "FAILED")

        self.wait(job, {"PENDING"}, timeout_s)
        _until(
            lambda: self._all_idle(self.nodes - (without is not None)),
            timeout_s,
            lambda: f"job {job} does not leave its nodes: {self.run('sinfo', '-h', '-N')}",
        )
        time.sleep(2)
        _until(has_started, timeout_s, lambda: f"job {job} stayed in the queue: {self.state(job)}")

    def _all_idle(self, nodes: int) -> bool:
        return len(self.run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split()) == nodes

    def close(self) -> None:
        """End all jobs, then all daemons."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["scancel", "--user=root", "--signal=KILL", "--full"], env=self.environment, timeout=10, capture_output=True)
                subprocess.run(["scancel", "--user=root"], env=self.environment, timeout=10, capture_output=True)
            with contextlib.suppress(TimeoutError, subprocess.TimeoutExpired):
                _until(lambda: not self.run("squeue", "--noheader", check=False).strip(), 10, "jobs do not end")
        for daemon in reversed(list(self._daemons.values())):
            daemon.send_signal(signal.SIGTERM)
        for daemon in self._daemons.values():
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()
        self._kill_what_is_left()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _kill_what_is_left(self) -> None:
        """Steps that a killed daemon left behind, and their ranks."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        """What carries the cluster's name."""
        found = psutil.process_iter(["environ"])
        return [process for process in found if (process.info["environ"] or {}).get("SLURM_CONF") == str(self.configuration)]

    def _start(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=self.environment)

    def _write(self) -> None:
        for name in ("state", *(f"spool-node{n}" for n in range(1, self.nodes + 1))):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        lost_after, kill_wait = self._times
        ports = _ports(self.nodes + 1)
        text = _CONFIGURATION.format(
            port=ports[0],
            first_job=random.randrange(*FIRST_JOBS),
            root=self.folder,
            nodes=self.nodes,
            lost_after=lost_after,
            kill_wait=kill_wait,
        )
        resources = []
        for number in range(1, self.nodes + 1):
            text += (
                f"NodeName=node{number} NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[number]} CPUs=16 Sockets=1 CoresPerSocket=16 "
            )
            text += f"ThreadsPerCore=1 RealMemory=4096 {f'Gres=gpu:{self._gpus}' if self._gpus else ''} State=UNKNOWN\n"
            for gpu in range(self._gpus):
                device = self.folder / f"gpu{gpu}"
                if not device.exists():
                    os.mknod(device, 0o20666, os.makedev(1, 3))
                resources.append(f"NodeName=node{number} Name=gpu File={device}\n")
        self.configuration.write_text(text)
        (self.folder / "gres.conf").write_text("".join(resources))


def _ports(number: int) -> list[int]:
    """Ports of the loopback address that nobody listens on, and that no outgoing connection is given."""
    found: list[int] = []
    while len(found) < number:
        port = random.randrange(*PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found += [port] if port not in found else []
    return found


def _until(true: object, timeout_s: float, problem: object) -> None:
    end = time.monotonic() + timeout_s
    while not true():  # type: ignore[operator]
        if time.monotonic() > end:
            raise TimeoutError(problem() if callable(problem) else problem)
        time.sleep(0.2)
