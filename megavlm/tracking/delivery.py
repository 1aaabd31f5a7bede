"""The process beside training that delivers to MLflow what is in a run's spool.

A process and not a thread: MLflow's client is Python, and a thread would take the interpreter from training for some milliseconds at a
time (docs/tracking.md has figures). It ends when it is told to, and when the process that started it is gone (orders.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.tracking.file_delivery import FILE_KINDS, FileDelivery, Tell
from megavlm.tracking.metrics import encode_line
from megavlm.tracking.mlflow_store import MlflowStore, Rejected, one_line, without_password
from megavlm.tracking.orders import Orders
from megavlm.tracking.run_start import Start, saved_run_id
from megavlm.tracking.spool import TORN, Item, SpoolReader, SpoolWriter
from megavlm.tracking.spool_folders import DELIVERY_LOCK, WRITER_LOCK, SpoolLock, TakenSpool, is_at_last_words
from megavlm.tracking.spool_owner import Heart, Owner
from megavlm.tracking.system_metrics import SystemMetrics

REJECTED_FILE = "mlflow-rejected.jsonl"
ITEMS_PER_DELIVERY = 500
DELIVER_EVERY_S = 1.0
RETRY_AFTER_S = (2.0, 5.0, 15.0, 60.0)
"""Pauses after a failed delivery; the last one repeats."""
INSIST_EVERY_S = 2.0
"""Pause between the last rounds of one who insists."""


class _DiskError(OSError):
    """What this machine's disk says of a spool or of the run's folder."""


@contextlib.contextmanager
def _on_disk() -> Iterator[None]:
    """Tells errors of the disk from those of a client, which may be of the same kind."""
    try:
        yield
    except OSError as error:
        raise _DiskError(str(error)) from error


@dataclass
class _Spool:
    """One that is delivered."""

    records: list[SpoolReader]
    files: FileDelivery
    taken: TakenSpool | None
    """None: this process's own."""


class Delivery:
    """Sends spools to a store, again and again until they are taken.

    Args:
        store: of one run.
        spool: this process's own.
        run_dir: where records that the store refuses for good are put.
        tell: hears of outages and their ends.
        earlier: spools that others have left behind. Each is delivered, before this one's own, and deleted, once its locks can be had.
        drop: kinds of records of the earlier ones that nobody wants any more.
        heart: beats for those of them that are taken.
    """

    def __init__(
        self,
        store: MlflowStore,
        spool: Path,
        run_dir: Path,
        tell: Tell,
        clock: Callable[[], float] = time.monotonic,
        *,
        earlier: Sequence[Path] = (),
        drop: Sequence[str] = (),
        heart: Heart | None = None,
    ) -> None:
        self._store, self._run_dir, self._tell, self._clock = store, run_dir, tell, clock
        self._failures, self._next_try = 0, 0.0
        self._trouble: str | None = None
        self._is_refused = False
        """The store said no to this user: asking again changes nothing."""
        self._disk_warned = False
        self._own, self._folder = self._delivered(spool, None), spool
        self._taken: list[_Spool] = []
        self._earlier, self._drop, self._heart = list(earlier), tuple(drop), heart or Heart()
        self.is_well = threading.Event()
        """The store took records a moment ago, so that it is worth trying with files."""

    def _delivered(self, folder: Path, taken: TakenSpool | None) -> _Spool:
        files = FileDelivery(folder, self._store, self._reject, self._tell, self._clock)
        return _Spool([SpoolReader(folder), SpoolReader(folder / "system")], files, taken)

    def round(self, try_now: bool = False) -> bool:
        """Deliver records, unless the store failed a moment ago. True: none is left that was there when the round began."""
        if not try_now and self._clock() < self._next_try:
            return False
        is_tidy = self._tidy(self._take_earlier)
        try:
            self._open_and_send()
        except Exception as error:  # whatever a client, a proxy, a database or a full disk raises: tracking never ends a run
            self._failed(error)
            return False
        if self._trouble is not None:
            self._tell("info", self._trouble)
        self._failures, self._next_try, self._trouble, self._is_refused = 0, 0.0, None, False
        is_tidy = self._tidy(self._remove_done) and is_tidy
        self.is_well.set()
        return is_tidy

    def files_round(self, try_now: bool = False) -> bool:
        """Upload files, those set aside a moment ago only with `try_now`. May take long; another thread may make `round`s meanwhile.

        Returns whether each was tried or is set aside.
        """
        for spool in (*self._taken, self._own):
            store_answers = False
            with contextlib.suppress(OSError):  # of this machine's disk, which `round` tells of
                store_answers = spool.files.round(try_now)
            if not store_answers:
                self.is_well.clear()  # until a round has found the store well again
                return False
        return True

    def end(self, uploads: threading.Thread | None = None, insists_until: float = 0.0) -> None:
        """The last round, for what a silent store takes now need not wait for another start; files behind the records, and behind what
        `uploads` has begun.

        Args:
            insists_until: rounds are repeated until this time, while the store does not answer or another process is at its last words;
                not where the store refuses this user.
        """
        aside_too = True  # once: they have few tries
        while True:
            is_done = self.round(try_now=True)
            if self.is_well.is_set():
                if uploads is not None:
                    uploads.join()
                is_done, aside_too = self.files_round(aside_too) and is_done, False
                self._tidy(self._remove_done)
            if is_done and not any(is_at_last_words(folder) for folder in self._earlier):
                return
            if self._is_refused or self._clock() + INSIST_EVERY_S >= insists_until:
                return
            time.sleep(INSIST_EVERY_S)

    def close(self) -> None:
        """No more rounds: no file of a spool stays open, and what was taken over is let go."""
        for spool in (*self._taken, self._own):
            spool.files.close()
        self.let_go()

    def let_go(self) -> None:
        """This process ends: any machine may go on with what it has taken over."""
        for spool in list(self._taken):
            if spool.taken is not None:
                self._heart.remove(spool.taken.owner)
                spool.taken.let_go()

    def _tidy(self, step: Callable[[], None]) -> bool:
        """Do something about what others left, which holds up nothing of this process's own. False: the disk did not take it."""
        try:
            step()
        except OSError as error:
            if not self._disk_warned:
                self._tell("warning", f"the disk holds up what other programs left for MLflow in {self._folder.parent} ({one_line(error)})")
            self._disk_warned = True
            return False
        return True

    def _take_earlier(self) -> None:
        trouble = None
        for folder in list(self._earlier):
            if folder.exists():
                taken = TakenSpool.take(folder)
                if taken is None:
                    continue  # its holder is at its last words, or still works
                try:
                    taken.keep(lambda item: item["kind"] not in self._drop)
                except OSError as error:  # a full disk: another round tries again
                    taken.release()
                    trouble = error
                    continue
                self._heart.add(taken.owner)
                self._taken.append(self._delivered(folder, taken))
            self._earlier.remove(folder)
        if trouble is not None:
            raise trouble

    def _remove_done(self) -> None:
        for spool in list(self._taken):
            if spool.taken is not None and spool.taken.remove_if_done():
                self._taken.remove(spool)
                self._heart.remove(spool.taken.owner)
                spool.files.close()
                spool.taken.release()

    def _failed(self, error: Exception) -> None:
        self.is_well.clear()
        self._next_try = self._clock() + RETRY_AFTER_S[min(self._failures, len(RETRY_AFTER_S) - 1)]
        self._failures += 1
        status = getattr(error, "get_http_status_code", None)  # of MLflow's errors
        self._is_refused = status is not None and status() in (401, 403)
        if isinstance(error, _DiskError):
            text = f"the disk holds up records for MLflow; they wait in {self._folder} ({one_line(error)})"
            over = "the disk takes records again"
        else:
            text = f"MLflow at {self._store.address} does not take records; they wait in {self._folder} ({one_line(error)})"
            over = f"MLflow at {self._store.address} answers again"
        if over != self._trouble:
            self._tell("warning", text)
        self._trouble = over

    def _open_and_send(self) -> None:
        if not self._store.is_open:
            self._store.open()
            self._tell("open", {"run_id": self._store.run_id, "experiment_id": self._store.experiment_id})
        trouble = None
        for spool in (*self._taken, self._own):
            try:
                self._send_all(spool)
            except _DiskError as error:  # of this spool: the others' records go out all the same
                trouble = error
        if trouble is not None:
            raise trouble

    def _send_all(self, spool: _Spool) -> None:
        for reader in spool.records:
            while True:
                with _on_disk():
                    items, bad, place = reader.peek(ITEMS_PER_DELIVERY)
                if records := [item for item in items if item["kind"] not in FILE_KINDS]:
                    self._send(records)
                # Only behind records that were taken: what is repeated after a failure must not put the same files there again.
                if bad:
                    self._reject(bad, TORN)
                with _on_disk():
                    if files := [item for item in items if item["kind"] in FILE_KINDS]:
                        spool.files.put(files)
                    reader.advance(place)
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
        with _on_disk(), open(path, "a", encoding="utf-8") as file:
            file.writelines(encode_line({"reason": reason, "record": line}) + "\n" for line in lines)
        self._tell("warning", f"MLflow refuses {len(lines)} records; they are in {path} ({reason[:300]})")


def main() -> None:
    """Read what to do from the first line of stdin, and do it until the next line, the end of stdin, or of the process argv names."""
    told, lock = os.fdopen(os.dup(1), "w", encoding="utf-8"), threading.Lock()
    os.dup2(2, 1)  # whatever a library prints is for the log, not for the one who listens here

    def tell(what: str, value: Any) -> None:
        with lock, contextlib.suppress(OSError, ValueError):  # nobody minds when the listener is gone
            told.write(json.dumps({what: value}) + "\n")
            told.flush()

    orders = Orders(0, int(sys.argv[1]))
    settings = orders.settings()
    if settings is None:
        return
    orders.listen()
    with contextlib.suppress(OSError):
        os.nice(5)  # training comes first
    run_dir, run_id, spool = Path(settings["run_dir"]), settings["run_id"], Path(settings["spool"])
    heart, owner = Heart(), Owner.of(spool)
    heart.add(owner)
    heart.start()
    held: SpoolLock | None = None
    # One process delivers a spool; the one before it was killed.
    while (held := held or SpoolLock.take(spool / DELIVERY_LOCK)) is None or (settings["follows"] and run_id is None):
        if orders.ended.wait(1.0):
            return
        run_id = run_id or saved_run_id(run_dir)  # the first node makes the run; the others wait until its id is there
    _deliver(settings, run_dir, run_id, spool, orders, tell, heart)
    # The program has let go of its spool when it said that this is the end; one that was killed has done so too.
    writer = SpoolLock.take(spool / WRITER_LOCK)
    if writer is not None:
        mine = TakenSpool(spool, [writer, held], owner)
        mine.remove_if_done()
        mine.release()


def _deliver(settings: dict[str, Any], run_dir: Path, run_id: str | None, spool: Path, orders: Orders, tell: Tell, heart: Heart) -> None:
    identity = (settings["uri"], settings["experiment"], settings["run_name"], run_dir, run_id, settings["params"])
    start = None if settings["start"] is None else Start(**settings["start"])
    writer = SpoolWriter(spool / "system")
    delivery = Delivery(
        MlflowStore(*identity, lambda text: tell("warning", text), settings["reopen"], start),
        spool,
        run_dir,
        tell,
        earlier=[Path(folder) for folder in settings["earlier"]],
        drop=settings["drop"],
        heart=heart,
    )
    sampler = SystemMetrics.start(settings["system_every_s"], settings["node"], settings["many_nodes"])
    orders.farewell = delivery.let_go
    uploads = threading.Thread(target=_send_files, args=(delivery, orders.ended), name="megavlm-files", daemon=True)
    uploads.start()
    while not orders.ended.wait(DELIVER_EVERY_S):
        if sampler is not None:
            with contextlib.suppress(OSError):  # a full disk, which `round` tells of
                writer.append(sampler.due())
        delivery.round()
    writer.close()
    delivery.end(uploads, orders.insists_until)  # whatever hangs in here: this process ends when it was told to (orders.py)
    delivery.close()


def _send_files(delivery: Delivery, ended: threading.Event) -> None:
    while not ended.wait(DELIVER_EVERY_S):
        if delivery.is_well.is_set():
            delivery.files_round()


if __name__ == "__main__":
    main()
