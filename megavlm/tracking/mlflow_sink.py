"""MLflow without waiting for it: training appends records to a spool on disk, a process beside it delivers them.

The rules, in order:
1. A training step never waits. Putting a record is appending a line to a file of this process alone.
2. Nothing is lost. A record is on the disk before anyone tries to send it; what a dead, frozen or absent server does not take, or this
   process was killed in front of, is sent when the server answers again, when the run starts the next time, or by `megavlm track replay`.
   What a server refuses for good goes to <run_dir>/mlflow-rejected.jsonl with the reason.
3. The program ends. `finish` waits 3 s for a server, then leaves the rest in the spool.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megavlm.config.schema import Recipe, TrackingConfig
from megavlm.tracking.console import get_logger
from megavlm.tracking.mlflow_store import (
    STATUSES,
    TrackingError,
    how_to_open,
    param_values,
    prepare_client_environment,
    tracking_uri,
)
from megavlm.tracking.old_spools import adopt_old_spools
from megavlm.tracking.run_start import Start, forget_run_id, saved_run_id
from megavlm.tracking.spool import Item, SpoolWriter
from megavlm.tracking.spool_folders import TakenSpool, make_spool, num_waiting, spools_of, waiting_of
from megavlm.tracking.spool_owner import Owner

FINISH_TIMEOUT_S = 3.0
"""With the interpreter's own end, an exit takes under 5 s whatever the server does."""
GO_ON_SQLITE_S = 30.0
"""A file on this machine always takes what it is given, and a run shorter than the store's first start (seconds) should be in it: the
delivering process may go on for so long behind the run's end. Where it is killed then (a container's end, SLURM) the spool has the rest."""
LETTING_GO_S = 1.0
"""Of the time at the end, a tenth at most: the delivering process then lets go of spools by itself, and is killed when it does not."""
RESTART_AFTER_S = 10.0
"""A delivering process that ended by itself (killed for memory, say) is started again after this."""

# Signals for training (Ctrl-C, SLURM's) reach the delivering process too, which must go on: it ends when training has said its last.
_DEAF = 'trap "" HUP INT QUIT TERM USR1 USR2; exec "$@"'

_log = get_logger(__name__)


@dataclass(frozen=True)
class Node:
    """A node of the run, of which each sends its own use of processors, memory and GPUs; the first one everything else."""

    index: int = 0
    count: int = 1

    @property
    def name(self) -> str:
        return os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID") or self.name_in_files

    @property
    def name_in_files(self) -> str:
        return f"node-{self.index}"


def node_of(rank: int, world_size: int, environ: Mapping[str, str]) -> Node | None:
    """The node that a rank speaks for, told by torchrun's LOCAL_RANK and LOCAL_WORLD_SIZE; None unless it is the first there."""
    here = int(environ.get("LOCAL_WORLD_SIZE") or world_size)
    if rank and int(environ.get("LOCAL_RANK") or rank) != 0:
        return None
    return Node(rank // here, -(-world_size // here))


class MlflowSink:
    """Delivers metrics, tags, files and the end status of one run, through a process of its own.

    Args:
        config: URI, experiment, system metrics.
        run_name: name of a new MLflow run.
        run_dir: holds the run's id (mlflow_run_id, which makes a restart continue the same MLflow run) and the spool.
        run_id: MLflow run to continue; None: the saved one, else MLFLOW_RUN_ID, else a new run.
        recipe: dumped recipe; its fields become the params of a new run.
        resume_step: training goes on after this step. 0: training begins anew, in a new MLflow run, since MLflow cannot take points
            back. None: nothing is trained, more is added to what is there.
        node: whose system metrics are sent.

    Raises TrackingError for a URI that cannot work. A server that cannot be reached is no error.
    """

    def __init__(
        self,
        config: TrackingConfig,
        run_name: str,
        run_dir: str | Path,
        run_id: str | None = None,
        *,
        recipe: Mapping[str, Any] | None = None,
        resume_step: int | None = None,
        node: Node | None = None,
    ) -> None:
        node = node or Node()
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self.uri = tracking_uri(config.mlflow_uri, self._run_dir)
        prepare_client_environment()
        anew = resume_step == 0 and node.index == 0
        start = Start.begin(self._run_dir, anew) if resume_step is not None and node.index == 0 else None
        saved = saved_run_id(self._run_dir)
        run_id = run_id or (None if anew else saved) or os.environ.get("MLFLOW_RUN_ID")
        if anew:
            forget_run_id(self._run_dir)
        # The end of an earlier start was not the end; what it measured stays, unless another MLflow run begins here.
        drop = [] if resume_step is None else ["status", "metrics"] if anew else ["status"]
        if node.index == 0:
            adopt_old_spools(self._run_dir)
        earlier = spools_of(self._run_dir) if node.index == 0 else []
        _drop(earlier, drop)
        self._folder, self._writer_lock = make_spool(self._run_dir, node.name_in_files)
        self._owner = Owner.of(self._folder)
        self._spool = SpoolWriter(self._folder)
        self._put_lock = threading.Lock()
        self._finished = False
        self._experiment_id: str | None = None
        self._settings = {
            "uri": self.uri,
            "experiment": config.experiment,
            "run_name": run_name,
            "run_dir": str(self._run_dir),
            "run_id": run_id,
            "reopen": resume_step is not None and node.index == 0,  # another node may open the run when the first has ended it
            "start": None if start is None else asdict(start),
            "params": param_values(recipe or {}),
            "spool": str(self._folder),
            "earlier": [str(folder) for folder in earlier],
            "drop": drop,
            "follows": node.index > 0,
            "node": node.name,
            "many_nodes": node.count > 1,
            "system_every_s": config.system_metrics_every_s if resume_step is not None else None,
        }
        self._run_id = run_id
        self._stopping = threading.Event()
        self._process = self._start()
        self._listener = threading.Thread(target=self._listen, name="megavlm-mlflow", daemon=True)
        self._listener.start()
        if saved and anew:
            self.tags({"earlier_run": saved})
        # A program that ends without finish() (an exception, sys.exit) must not lose what is queued.
        atexit.register(self.finish, "FAILED")

    # ------------------------------------------------------------------------------------------ the training thread

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of one step, already flat ("lr/vision")."""
        self._put({"kind": "metrics", "step": int(step), "time_ms": _now_ms(), "values": {k: float(v) for k, v in values.items()}})

    def tags(self, values: Mapping[str, object]) -> None:
        """Settings that may change during the run; the newest value of each stays."""
        self._put({"kind": "tags", "values": {k: str(v) for k, v in values.items()}})

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """A file or folder, to be stored under `folder`. It is read later: it must stay until the run ends."""
        self._put({"kind": "artifact", "path": str(Path(path).resolve()), "folder": folder})

    def table(self, path: str | Path, folder: str = "") -> None:
        """A JSON file {"columns": [...], "data": [[...]]}, shown on MLflow's page of evaluation tables; else as `artifact`."""
        self._put({"kind": "table", "path": str(Path(path).resolve()), "folder": folder})

    def model(self, folder: str | Path, name: str) -> None:
        """A model's folder, to be stored with the run and registered as a new version of `name`. Give `finish` the time it takes."""
        folder = Path(folder).resolve()
        self._put({"kind": "model", "path": str(folder), "name": name, "digest": _digest(folder)})

    def finish(self, status: str | None = "FINISHED", timeout_s: float | None = None, insists: bool = False) -> int:
        """Deliver what waits and close the run; after `timeout_s` the rest stays in the spool.

        Args:
            status: of the run from now on; None leaves it to the one that waits in the spool.
            timeout_s: None: FINISH_TIMEOUT_S; the process that delivers to an sqlite store then goes on by itself, for GO_ON_SQLITE_S.
            insists: a store that does not answer is asked again until the time is up, not only once.

        Returns the number of records in the spool. Raises TrackingError for a status that MLflow does not have.
        A second call does nothing.
        """
        if status is not None and status not in STATUSES:
            raise TrackingError(f"status={status!r} is none of {', '.join(STATUSES)}")
        if self._finished:
            return num_waiting(self._folder)
        if status is not None:
            self._put({"kind": "status", "status": status, "time_ms": _now_ms()})
        self._finished = True
        self._spool.close()
        self._writer_lock.release()
        leaves = timeout_s is None and self.uri.startswith("sqlite")
        has_ended = self._end_process(FINISH_TIMEOUT_S if timeout_s is None else timeout_s, leaves, insists)
        atexit.unregister(self.finish)
        # What the delivering process noted on disk is what counts: it may have been killed at any moment.
        waiting = num_waiting(self._folder)
        if has_ended and self._owner is not None:
            self._owner.let_go()
        if has_ended and not waiting and (left := TakenSpool.take(self._folder)) is not None:
            left.remove_if_done()
            left.release()
        if waiting:
            later = f"they are sent when this run starts again, or by `megavlm track replay {self._run_dir}`"
            if not has_ended:
                later = f"process {self._process.pid} sends them within {GO_ON_SQLITE_S:.0f} s; if it is killed {later}"
            _log.warning("%d records wait for MLflow in %s: %s", waiting, self._folder, later)
        return waiting

    def how_to_open(self) -> str:
        """The command, or the address for a server, that shows this run."""
        return how_to_open(self.uri, self._experiment_id, self.run_id)

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None until the store has answered for the first time."""
        return self._run_id

    @property
    def process_id(self) -> int:
        """Of the delivering process."""
        return self._process.pid

    def _put(self, item: Item) -> None:
        if self._finished:
            raise TrackingError(f"a record of kind {item['kind']!r} came after finish(): log it before, or start the run's tracking again")
        with self._put_lock:
            self._spool.append([item])

    # ------------------------------------------------------------------------------------------ the process beside it

    def _start(self) -> subprocess.Popen[bytes]:
        command = ["/bin/sh", "-c", _DEAF, "sh", sys.executable, "-m", "megavlm.tracking.delivery", str(os.getpid())]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        # Unbuffered: a buffer has a lock, and the end of this program would find it held by the thread that listens to one who goes on.
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, bufsize=0)
        self._order(process, json.dumps({**self._settings, "run_id": self._run_id}))
        return process

    @staticmethod
    def _order(process: subprocess.Popen[bytes], line: str) -> None:
        assert process.stdin is not None
        left = memoryview(f"{line}\n".encode())
        with contextlib.suppress(OSError):  # it has ended: the listener notices
            while left:
                left = left[process.stdin.write(left) :]

    def _listen(self) -> None:
        """What the process says, until training ends; starts it again when it ended by itself."""
        while True:
            process = self._process
            assert process.stdout is not None
            for line in process.stdout:
                self._hear(line)
            if self._stopping.is_set():
                return
            _log.warning("the process that delivers to MLflow ended (%s); it is started again in %.0f s", process.wait(), RESTART_AFTER_S)
            if not self._start_again():
                return

    def _start_again(self) -> bool:
        """After RESTART_AFTER_S, or as soon behind it as the machine has a process to give. False: training ended meanwhile."""
        has_warned = False
        while not self._stopping.wait(RESTART_AFTER_S):
            try:
                self._process = self._start()
                return True
            except OSError as error:  # too many processes, no memory
                if not has_warned:
                    again = f"tried again every {RESTART_AFTER_S:.0f} s"
                    _log.warning("the process that delivers to MLflow cannot be started (%s): %s", error, again)
                has_warned = True
        return False

    def _hear(self, line: bytes) -> None:
        try:
            [(what, value)] = json.loads(line).items()
        except (ValueError, AttributeError):
            return  # the half of a line that its writer was killed in
        if what == "open":
            self._run_id, self._experiment_id = value["run_id"], value["experiment_id"]
        elif what in ("info", "warning"):
            (_log.warning if what == "warning" else _log.info)("%s", value)

    def _end_process(self, timeout_s: float, leaves: bool, insists: bool) -> bool:
        """Whether the delivering process has ended; one that `leaves` may go on."""
        self._stopping.set()
        process, end = self._process, time.monotonic() + timeout_s
        seconds = GO_ON_SQLITE_S if leaves else max(0.9 * timeout_s, timeout_s - LETTING_GO_S)
        self._order(process, json.dumps({"seconds": seconds, "leaves": leaves, "insists": insists}))
        has_ended = False
        for patience, say in ((min(2.0, timeout_s), timeout_s > 2.0), (timeout_s, False)):
            try:
                process.wait(max(0.0, min(patience, end - time.monotonic())))
                has_ended = True
                break
            except subprocess.TimeoutExpired:
                if say:
                    _log.info("waiting up to %.0f s for MLflow to take the last records", end - time.monotonic())
        if not has_ended and not leaves:
            process.kill()
            process.wait()
            has_ended = True
        if has_ended:
            self._listener.join(1.0)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None and not self._listener.is_alive():
                pipe.close()
        return has_ended


def sink_for(recipe: Recipe, resume_step: int | None = None, node: Node | None = None) -> MlflowSink | None:
    """The sink that `recipe` asks for; None with tracking.mlflow=false."""
    if not recipe.tracking.mlflow:
        return None
    dumped = recipe.model_dump(mode="json")
    return MlflowSink(recipe.tracking, recipe.run.name, recipe.run.dir, recipe=dumped, resume_step=resume_step, node=node)


def deliver_spool(recipe: Recipe, timeout_s: float = 120.0) -> int:
    """Send what ended programs of a run could not deliver, again and again until it is taken or the time is up. Returns the number of
    records that still wait and are nobody's.

    Raises TrackingError with tracking.mlflow=false.
    """
    sink = sink_for(recipe)
    if sink is None:
        raise TrackingError(f"tracking.mlflow=false: the run in {recipe.run.dir} is not in MLflow, so there is nothing to send")
    sink.finish(None, timeout_s, insists=True)
    return waiting_of(Path(recipe.run.dir)).left


def _drop(spools: Sequence[Path], kinds: Sequence[str]) -> None:
    """Records of these kinds in what earlier programs left; where one is at its last words, or the disk is full, the delivering process
    does it later."""
    for folder in spools if kinds else ():
        taken = TakenSpool.take(folder)
        if taken is not None:
            with contextlib.suppress(OSError):
                taken.keep(lambda item: item["kind"] not in kinds)
            taken.release()


def _digest(folder: Path) -> str:
    """Tells one state of a folder from another: its files' names, sizes and times. (Reading weights again would take minutes.)"""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    seen = [(p.relative_to(folder).as_posix(), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()[:16]


def _now_ms() -> int:
    return int(time.time() * 1000)
