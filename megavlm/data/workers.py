"""Worker processes that materialise packs: Python's threads share one lock, processes do not.

Each calling thread owns one process and waits for it. A process that dies (killed, out of memory, a decoder that crashes) is replaced
and its microbatch done again, at most MAX_ATTEMPTS times; the work is a pure function, so the result is the same. Workers see no GPU:
they decode on the CPU, and read shards through indexes that they open themselves.
"""

from __future__ import annotations

import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

import torch

from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.bad_samples import BadDataError
from megavlm.data.batch_memory import read_batch
from megavlm.data.index import SampleIndex
from megavlm.data.materialise import Materialiser
from megavlm.data.tokenizer import load_tokenizer
from megavlm.data.types import PackedBatch, PackPlan, SampleRef

MAX_ATTEMPTS = 3
"""So often is one microbatch given to a worker before it is said to kill them."""
_START = "from megavlm.data.worker_process import main; main()"
log = logging.getLogger(__name__)


class WorkerError(RuntimeError):
    """Data worker processes that cannot be started."""


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker needs to build its Materialiser; travels once, as a pickle."""

    recipe: Recipe
    stage: StageConfig
    indexes: Mapping[str, SampleIndex]
    tokenizer_fingerprint: str
    needs_tiles: bool
    check_images: bool

    def open(self) -> Materialiser:
        """The worker's own Materialiser. Raises WorkerError when the tokenizer's files changed since the run began."""
        torch.set_num_threads(1)
        tokenizer = load_tokenizer(self.recipe.data.tokenizer, self.recipe.data.image_token)
        if tokenizer.fingerprint != self.tokenizer_fingerprint:
            raise WorkerError(f"{self.recipe.data.tokenizer} changed while the run was going on: start the run again")
        return Materialiser(self.recipe, self.stage, self.indexes, tokenizer, needs_tiles=self.needs_tiles, check_images=self.check_images)


class _Died(Exception):
    """A worker ended before it answered."""


class _Worker:
    """One process and our end of its socket."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join(p or str(Path.cwd()) for p in sys.path),
                "CUDA_VISIBLE_DEVICES": "",
                "OMP_NUM_THREADS": "1",
            }
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", _START, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,  # Ctrl-C in a terminal goes to the run alone
            )
            self._pipe = Connection(ours.detach())
        self.is_ready = False
        self.last_sample: SampleRef | None = None

    def prepare(self, setup: bytes) -> None:
        """Hand over the setup and wait until the worker is ready."""
        self._send(setup)
        self._answer()
        self.is_ready = True

    def materialise(self, packs: Sequence[PackPlan], names_samples: bool) -> PackedBatch:
        """The microbatch; with `names_samples` it says what it is at (`last_sample`)."""
        self.last_sample = None
        self._send(pickle.dumps((packs, names_samples), protocol=pickle.HIGHEST_PROTOCOL))
        description = self._answer()
        try:
            return read_batch(description, recv_handle(self._pipe))
        except (EOFError, ConnectionError) as error:
            raise _Died from error

    def _send(self, message: bytes) -> None:
        try:
            self._pipe.send_bytes(message)
        except OSError as error:
            raise _Died from error

    def _answer(self) -> Any:
        while True:
            try:
                kind, value = self._pipe.recv()
            except (EOFError, OSError) as error:
                raise _Died from error
            if kind == "error":
                problem, text = value
                problem.add_note(f"in data worker process {self.process.pid}:\n{text}")
                raise problem
            if kind != "at":
                return value
            self.last_sample = value

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def end(self) -> str:
        """Kill it if it lives. Returns how it ended."""
        self.process.kill()
        code = self.process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")


class WorkerPool:
    """A Materialiser whose work is done by processes: call it from as many threads as there shall be processes.

    Raises, from a call:
        BadDataError: MAX_ATTEMPTS workers died over the same microbatch; names the sample that they were at.
        WorkerError: workers end before they are ready.
        Anything that the Materialiser raises.
    """

    def __init__(self, setup: WorkerSetup) -> None:
        self._setup, self._setup_bytes = setup, pickle.dumps(setup, protocol=pickle.HIGHEST_PROTOCOL)
        self._mine = threading.local()
        self._lock = threading.Lock()
        self._workers: set[_Worker] = set()
        self._is_closed = False
        self.num_restarts = 0
        """Workers that died and were replaced."""

    @property
    def process_ids(self) -> list[int]:
        """Of the workers that live."""
        with self._lock:
            return [w.process.pid for w in self._workers if not w.has_ended()]

    def __call__(self, packs: Sequence[PackPlan]) -> PackedBatch:
        """As Materialiser.__call__."""
        for attempt in range(1, MAX_ATTEMPTS + 1):
            worker = self._worker()
            try:
                if not worker.is_ready:
                    worker.prepare(self._setup_bytes)
                return worker.materialise(packs, names_samples=attempt > 1)
            except _Died:
                self._mine.worker = None
                how = self._bury(worker)
            except BaseException:
                if not worker.is_ready:  # it said why it cannot work, and ends
                    self._mine.worker = None
                    self._bury(worker, expected=True)
                raise
        if not worker.is_ready:
            raise WorkerError(
                f"{MAX_ATTEMPTS} data worker processes ended before they were ready; the last {how}. What they said stands above;"
                " with data.workers=threads there are none"
            )
        raise BadDataError(
            f"{MAX_ATTEMPTS} data workers died over the same packs; the last {how} at {self._where(worker.last_sample, packs)}. Remove or"
            " repair this sample; if the machine is short of memory, lower data.num_workers or data.prefetch_steps"
        )

    def _where(self, ref: SampleRef | None, packs: Sequence[PackPlan]) -> str:
        if ref is not None:
            return f"source {ref.source!r}, {self._setup.indexes[ref.source].where(ref.row)}"
        samples = [s for pack in packs for s in pack.samples]
        return f"one of {len(samples)} samples, the first of them {self._setup.indexes[samples[0].source].where(samples[0].row)}"

    def _worker(self) -> _Worker:
        """This thread's worker, started when there is none or the last one died while idle."""
        worker: _Worker | None = getattr(self._mine, "worker", None)
        if worker is not None and worker.has_ended():
            self._bury(worker)
            worker = None
        if worker is None:
            with self._lock:
                self._refuse_if_closed()
                worker = _Worker()
                self._workers.add(worker)
            self._mine.worker = worker
        return worker

    def _bury(self, worker: _Worker, expected: bool = False) -> str:
        how = worker.end()
        with self._lock:
            self._workers.discard(worker)
            self._refuse_if_closed()
            if not expected:
                self.num_restarts += 1
                log.warning("data worker process %d %s; a new one does its work again", worker.process.pid, how)
        return how

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise WorkerError("the data workers were closed")

    def close(self) -> None:
        """End all processes; calls that wait for them raise WorkerError."""
        with self._lock:
            self._is_closed = True
            workers = list(self._workers)
        for worker in workers:
            worker.end()
