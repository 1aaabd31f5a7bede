"""The process beside training that delivers to MLflow what is in a run's spool.

A process and not a thread: MLflow's client is Python, and a thread would take the interpreter from training for some milliseconds at a
time (docs/tracking.md has figures). It ends when it is told to, and when the process that started it is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from megavlm.tracking.metrics import encode_line
from megavlm.tracking.mlflow_store import MlflowStore, Rejected, saved_run_id, without_password
from megavlm.tracking.spool import LOCK_FILE, Item, SpoolReader, SpoolWriter
from megavlm.tracking.system_metrics import SystemMetrics

REJECTED_FILE = "mlflow-rejected.jsonl"
ITEMS_PER_DELIVERY = 500
DELIVER_EVERY_S = 1.0
RETRY_AFTER_S = (2.0, 5.0, 15.0, 60.0)
"""Pauses after a failed delivery; the last one repeats."""

Tell = Callable[[str, Any], None]
"""(what, value) for the process that started this one: what is "info", "warning" or "open"."""


class Delivery:
    """Sends a spool to a store, again and again until it is taken.

    Args:
        store: of one run.
        spools: delivered in this order.
        run_dir: where records that the store refuses for good are put.
        tell: hears of outages and their ends.
    """

    def __init__(
        self, store: MlflowStore, spools: list[SpoolReader], run_dir: Path, tell: Tell, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._store, self._spools, self._run_dir, self._tell, self._clock = store, spools, run_dir, tell, clock
        self._failures, self._next_try = 0, 0.0

    def round(self, try_now: bool = False) -> bool:
        """Deliver what waits, unless the store failed a moment ago. True: nothing is left that was there when the round began."""
        if not try_now and self._clock() < self._next_try:
            return False
        try:
            self._open_and_send()
        except Exception as error:  # whatever a client, a proxy or a database raises: tracking never ends a run
            self._failed(error)
            return False
        if self._failures:
            self._tell("info", f"MLflow at {self._store.address} answers again")
        self._failures, self._next_try = 0, 0.0
        return True

    def _failed(self, error: Exception) -> None:
        self._next_try = self._clock() + RETRY_AFTER_S[min(self._failures, len(RETRY_AFTER_S) - 1)]
        if not self._failures:
            reason = (without_password(f"{type(error).__name__}: {error}").splitlines() or [""])[0][:300]
            where = self._spools[0].folder
            self._tell("warning", f"MLflow at {self._store.address} does not take records; they wait in {where} ({reason})")
        self._failures += 1

    def _open_and_send(self) -> None:
        if not self._store.is_open:
            self._store.open()
            self._tell("open", {"run_id": self._store.run_id, "experiment_id": self._store.experiment_id})
        for spool in self._spools:
            while True:
                items, bad, place = spool.peek(ITEMS_PER_DELIVERY)
                if bad:
                    self._reject(bad, "a line of the spool that is no record (torn by a crash?)")
                if items:
                    self._send(items)
                spool.advance(place)
                if not items and not bad:
                    break

    def _send(self, items: list[Item]) -> None:
        try:
            self._store.send(items)
        except Rejected as error:
            if len(items) == 1:
                self._reject([encode_line(items[0])], str(error))
                return
            for item in items:  # find the one that is refused; the others are taken, the same twice is once
                self._send([item])

    def _reject(self, lines: list[str], reason: str) -> None:
        path = self._run_dir / REJECTED_FILE
        reason = without_password(reason)
        self._tell("warning", f"MLflow refuses {len(lines)} records; they are in {path} ({reason[:300]})")
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(encode_line({"reason": reason, "record": line}) + "\n" for line in lines)


class _Orders:
    """The other end of the pipe from training: first a line of settings, later one with the seconds that are left, or its end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._parent, self._read = descriptor, os.getppid(), b""

    def settings(self) -> dict[str, Any] | None:
        """None: training ended before it said anything."""
        line = self._line(None)
        return dict(json.loads(line)) if line else None

    def wait(self, seconds: float) -> float | None:
        """None: go on. Else the seconds in which to end; a parent that died leaves as many as it would have given by itself."""
        line = self._line(seconds)
        if line:
            return float(line)
        return _AFTER_DEATH_S if line == b"" or os.getppid() != self._parent else None

    def _line(self, seconds: float | None) -> bytes | None:
        """The next line; b"" at the end of the pipe, None when there is none in so many seconds."""
        while b"\n" not in self._read:
            if not select.select([self._descriptor], [], [], seconds)[0]:
                return None
            found = os.read(self._descriptor, 1 << 16)
            if not found:
                return b""
            self._read += found
        line, _, self._read = self._read.partition(b"\n")
        return line


_AFTER_DEATH_S = 3.0


def main() -> None:
    """Read what to do from the first line of stdin, and do it until the next line, or the end of stdin."""
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is for the log, not for the one who listens here

    def tell(what: str, value: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody minds when the listener is gone
            told.write(json.dumps({what: value}) + "\n")
            told.flush()

    orders = _Orders(0)
    settings = orders.settings()
    if settings is None:
        return
    with contextlib.suppress(OSError):
        os.nice(5)  # training comes first
    run_dir = Path(settings["run_dir"])
    run_id = settings["run_id"]
    spool = Path(settings["spool"])
    spool.mkdir(parents=True, exist_ok=True)
    # One process delivers a spool: that of a killed training may be at its last words, and a replay may be asked for too early.
    with open(spool / LOCK_FILE, "wb") as lock:
        while not _locked(lock) or (settings["follows"] and run_id is None):
            if orders.wait(1.0) is not None:
                return
            run_id = run_id or saved_run_id(run_dir)  # the first node makes the run; the others wait until its id is there
        _deliver(settings, run_dir, run_id, spool, orders, tell)


def _deliver(settings: dict[str, Any], run_dir: Path, run_id: str | None, spool: Path, orders: _Orders, tell: Tell) -> None:
    identity = (settings["uri"], settings["experiment"], settings["run_name"], run_dir, run_id, settings["params"])
    writer = SpoolWriter(spool / "system")
    delivery = Delivery(
        MlflowStore(*identity, lambda text: tell("warning", text), settings["reopen"]),
        [SpoolReader(spool), SpoolReader(spool / "system")],
        run_dir,
        tell,
    )
    sampler = SystemMetrics.start(settings["system_every_s"], settings["node"], settings["many_nodes"])
    while (deadline := orders.wait(DELIVER_EVERY_S)) is None:
        if sampler is not None:
            writer.append(sampler.due())
        delivery.round()
    writer.close()
    # What a silent server takes now need not wait for another start. Whoever waits for this kills it when the time is up.
    _end_after(deadline)
    delivery.round(try_now=True)


def _locked(lock: BinaryIO) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True  # a file system without locks
    return True


def _end_after(seconds: float) -> None:
    """This process ends then, whatever it waits for: it must not outlive a training that was killed."""
    import threading

    timer = threading.Timer(seconds, os._exit, (3,))
    timer.daemon = True
    timer.start()


if __name__ == "__main__":
    main()
