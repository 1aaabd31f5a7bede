"""MLflow without waiting for it: training puts records in memory, a thread delivers them.

The rules, in order:
1. A training step never waits. Putting a record is appending to a queue; no lock that a slow server could hold.
2. Nothing is lost. What a dead, frozen or absent server does not take goes to <run_dir>/mlflow-spool.jsonl, and is sent
   when the server answers again or when the run starts the next time. What a server refuses for good goes to
   <run_dir>/mlflow-rejected.jsonl with the reason.
3. The program ends. `finish` waits 3 s for a server, then leaves the rest in the spool.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megavlm.config.schema import Recipe, TrackingConfig
from megavlm.tracking.console import get_logger
from megavlm.tracking.metrics import encode_line
from megavlm.tracking.mlflow_store import (
    STATUSES,
    MlflowStore,
    Rejected,
    TrackingError,
    how_to_open,
    param_values,
    prepare_client_environment,
    saved_run_id,
    tracking_uri,
    without_password,
)
from megavlm.tracking.spool import Item, Spool

SPOOL_FILE = "mlflow-spool.jsonl"
REJECTED_FILE = "mlflow-rejected.jsonl"

MAX_QUEUED = 10_000
"""Records in memory; more go straight to the spool."""
ITEMS_PER_DELIVERY = 500
DELIVER_EVERY_S = 1.0
RETRY_AFTER_S = (2.0, 5.0, 15.0, 60.0)
"""Pauses after a failed delivery; the last one repeats."""
FINISH_TIMEOUT_S = 3.0
"""With the interpreter's own end, an exit takes under 5 s whatever the server does."""
FINISH_TIMEOUT_SQLITE_S = 30.0
"""A file on this machine always gets there; a run shorter than the store's first start (seconds) should be in it."""

_log = get_logger(__name__)


class MlflowSink:
    """Delivers metrics, tags, files and the end status of one run, in a thread of its own.

    Args:
        config: URI and experiment.
        run_name: name of a new MLflow run.
        run_dir: holds the run's id (mlflow_run_id, which makes a restart continue the same MLflow run) and the spool.
        run_id: MLflow run to continue; None: the saved one, else MLFLOW_RUN_ID, else a new run.
        recipe: dumped recipe; its fields become the params of a new run.
        resume_step: training goes on after this step. Metrics of later steps that still wait in the spool are dropped: they
            will be made again. 0: training begins anew, in a new MLflow run, since MLflow cannot take points back.
            None: nothing is trained, more is added to what is there.

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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_dir = Path(run_dir)
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self.uri = tracking_uri(config.mlflow_uri, self._run_dir)
        prepare_client_environment()
        saved = saved_run_id(self._run_dir)
        run_id = run_id or (None if resume_step == 0 else saved) or os.environ.get("MLFLOW_RUN_ID")
        params = param_values(recipe or {})
        self._store = MlflowStore(self.uri, config.experiment, run_name, self._run_dir, run_id, params, _log.warning)
        self._spool = Spool(self._run_dir / SPOOL_FILE)
        if resume_step is not None:
            self._spool.keep(lambda item: not _is_outdated(item, resume_step))
        self._clock = clock
        # deque: append and popleft need no lock, so a put never waits for the thread.
        self._queue: deque[Item] = deque()
        self._in_flight: list[Item] = []
        self._handover = threading.Lock()
        self._abandoned = self._finished = False
        self._failures, self._next_try = 0, 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="megavlm-mlflow", daemon=True)
        self._thread.start()
        if saved and run_id is None:
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

    def finish(self, status: str | None = "FINISHED", timeout_s: float | None = None) -> int:
        """Deliver what is queued and close the run; after `timeout_s` the rest stays in the spool.

        Args:
            status: of the run from now on; None leaves it to the one that waits in the spool.
            timeout_s: None: FINISH_TIMEOUT_S, or FINISH_TIMEOUT_SQLITE_S for an sqlite store.

        Returns the number of records in the spool. Raises TrackingError for a status that MLflow does not have.
        A second call does nothing.
        """
        if status is not None and status not in STATUSES:
            raise TrackingError(f"status={status!r} is none of {', '.join(STATUSES)}")
        if self._finished:
            return len(self._spool)
        if status is not None:
            self._put({"kind": "status", "status": status, "time_ms": _now_ms()})
        self._finished = True
        self._stop.set()
        if timeout_s is None:
            timeout_s = FINISH_TIMEOUT_SQLITE_S if self.uri.startswith("sqlite") else FINISH_TIMEOUT_S
        self._thread.join(min(2.0, timeout_s))
        if self._thread.is_alive() and timeout_s > 2.0:
            _log.info("waiting up to %.0f s for MLflow to take the last records", timeout_s - 2.0)
            self._thread.join(timeout_s - 2.0)
        if self._thread.is_alive():
            with self._handover:
                self._abandoned = self._store.cancelled = True
                self._spool.append(self._in_flight)
                self._spool.append(self._drain(len(self._queue)))
        atexit.unregister(self.finish)
        if waiting := len(self._spool):
            _log.warning("%d records wait for MLflow in %s: they are sent when this run starts again", waiting, self._spool.path)
        return waiting

    def how_to_open(self) -> str:
        """The command, or the address for a server, that shows this run."""
        return how_to_open(self.uri, self._store.experiment_id, self._store.run_id)

    @property
    def run_id(self) -> str | None:
        """Id of the MLflow run; None until the store has answered for the first time."""
        return self._store.run_id

    def _put(self, item: Item) -> None:
        if self._finished:
            raise TrackingError(f"a record of kind {item['kind']!r} came after finish(): log it before, or start the run's tracking again")
        if len(self._queue) < MAX_QUEUED:
            self._queue.append(item)
        else:
            self._spool.append([item])

    # ---------------------------------------------------------------------------------------------- the sink's thread

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(DELIVER_EVERY_S)
            # The last round tries a silent server once more: what it takes now need not wait for another start.
            self._deliver(try_now=stopping)

    def _deliver(self, try_now: bool) -> None:
        """One round: the spool first, then the queue; or, while the server is silent, the queue into the spool."""
        reachable = False
        if try_now or self._clock() >= self._next_try:
            reachable = self._attempt(self._open_and_replay)
        while self._take():
            if not (reachable and self._attempt(self._send_in_flight)):
                reachable = False
                self._keep_in_flight()

    def _attempt(self, action: Callable[[], None]) -> bool:
        """Run `action`; a failure is reported once per outage and sets the time of the next try."""
        try:
            action()
        except Exception as error:  # whatever a client, a proxy or a database raises: tracking never ends a run
            pause = RETRY_AFTER_S[min(self._failures, len(RETRY_AFTER_S) - 1)]
            self._next_try = self._clock() + pause
            if not self._failures and not self._abandoned:
                reason = without_password(f"{type(error).__name__}: {error}").splitlines()[0][:300]
                _log.warning("MLflow at %s does not answer; records go to %s (%s)", without_password(self.uri), self._spool.path, reason)
            self._failures += 1
            return False
        if self._failures:
            _log.info("MLflow at %s answers again", without_password(self.uri))
        self._failures, self._next_try = 0, 0.0
        return True

    def _open_and_replay(self) -> None:
        if not self._store.is_open:
            self._store.open()
        while not self._abandoned:
            items, bad, position = self._spool.peek(ITEMS_PER_DELIVERY)
            if not items and not bad:
                break
            if bad:
                self._reject(bad, f"line of {SPOOL_FILE} that is no record (torn by a crash?)")
            self._send(items)
            self._spool.advance(position)
        if not self._abandoned:
            self._spool.compact()

    def _take(self) -> bool:
        """Move records from the queue in flight; under the lock, so that finish() finds each in one place or the other."""
        with self._handover:
            self._in_flight = [] if self._abandoned else self._drain(ITEMS_PER_DELIVERY)
            return bool(self._in_flight)

    def _send_in_flight(self) -> None:
        self._send(self._in_flight)

    def _send(self, items: list[Item]) -> None:
        try:
            self._store.send(items)
        except Rejected as error:
            if len(items) == 1:
                self._reject([encode_line(items[0])], str(error))
                return
            for item in items:  # find the one that is refused; the others are taken, the same twice is once
                self._send([item])

    def _keep_in_flight(self) -> None:
        with self._handover:
            if not self._abandoned:  # else finish() has put them in the spool
                self._spool.append(self._in_flight)

    def _reject(self, lines: list[str], reason: str) -> None:
        path = self._run_dir / REJECTED_FILE
        _log.warning("MLflow refuses %d records; they are in %s (%s)", len(lines), path, without_password(reason)[:300])
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(encode_line({"reason": without_password(reason), "record": line}) + "\n" for line in lines)

    def _drain(self, count: int) -> list[Item]:
        """Under the lock, or when the thread has ended: one drains at a time."""
        return [self._queue.popleft() for _ in range(min(count, len(self._queue)))]


def sink_for(recipe: Recipe, resume_step: int | None = None) -> MlflowSink | None:
    """The sink that `recipe` asks for; None with tracking.mlflow=false."""
    if not recipe.tracking.mlflow:
        return None
    dumped = recipe.model_dump(mode="json")
    return MlflowSink(recipe.tracking, recipe.run.name, recipe.run.dir, recipe=dumped, resume_step=resume_step)


def deliver_spool(recipe: Recipe, timeout_s: float = 120.0) -> int:
    """Send what an ended run could not deliver, once its server answers. Returns the number of records that still wait."""
    sink = sink_for(recipe)
    if sink is None:
        raise TrackingError(f"tracking.mlflow=false: the run in {recipe.run.dir} is not in MLflow, so there is nothing to send")
    return sink.finish(None, timeout_s)


def _is_outdated(item: Item, resume_step: int) -> bool:
    """Spooled by an earlier start of this run, and to be made again; or an end that was not the end."""
    return item["kind"] == "status" or (item["kind"] == "metrics" and int(item["step"]) > resume_step)


def _now_ms() -> int:
    return int(time.time() * 1000)
