"""Saving while training goes on.

    begin     every rank copies its share to host memory (the only part that training waits for); a thread writes it
    written   all ranks' files are on the disk, fsynced: seen at the end of a step, by numbers that ranks exchange there anyway
    published rank 0's thread has written index, state and manifest, given the folder its name and moved `latest`: seen likewise
    tidied    what the new one replaces is deleted, on the nodes' own disks by each node: the next save needs the room

Threads write, not processes: hashing, writing and fsyncing hold no lock of the interpreter, there is nobody who can be killed without
the rank, and nobody who outlives it. No thread waits for another rank. So a rank that dies leaves a folder that ends in `.tmp` and the
checkpoints before it; a disk that hangs ends the job by the watchdog of the thread that hangs, which gives each part of a save (writing,
publishing, tidying up) `timeout_s`; where training waits for it, all of it has that time and some seconds (training/sections.py).
megatron-core's writer is not used: it forks a process a file and waits for it without a limit, so that a killed one hangs the job, and
starts a manager process that imports `__main__` again and outlives the rank.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import megavlm
from megavlm.checkpoint import folders, optimizer_state
from megavlm.checkpoint.pieces import Piece, pieces_of
from megavlm.checkpoint.random_states import RandomStates, grid_of
from megavlm.checkpoint.shares import Nodes, agree_on_shares
from megavlm.checkpoint.staging import Staging
from megavlm.checkpoint.watchdog import watchdog
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.sharded import is_sharded

_log = logging.getLogger(__name__)
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
"""What a system says where there is no room."""
_SLICE_BYTES = 16 << 20
_UNDER_WAY, _WRITTEN, _PUBLISHED, _TIDIED = 0, 1, 2, 3


class Outcome(NamedTuple):
    """How a save ended; the same on every rank."""

    path: Path
    is_local: bool
    stall_s: float
    """Seconds that training waited for the copy."""
    seconds: float
    """From the copy to the end."""
    error: str | None = None
    """Why it failed; nothing has got the name `path` then."""
    is_full: bool = False
    """There was no room."""


@dataclass
class _Job:
    """A save under way, on this rank."""

    path: Path
    unfinished: Path
    state: str
    is_local: bool
    began: float
    stall_s: float = 0.0
    stage: int = _UNDER_WAY
    files: dict[str, Any] = field(default_factory=dict)
    """Manifest entries of what this rank wrote."""
    error: OSError | Exception | None = None
    is_publishing: bool = False
    is_tidying: bool = False
    is_cancelled: bool = False
    thread: threading.Thread | None = None


class Saver:
    """Saves of one model. Every rank calls the same methods at the same steps; one save is under way at a time."""

    def __init__(
        self, chunks: Sequence[torch.nn.Module], optimizer: Any | None, ctx: ParallelContext, *, timeout_s: float, on_nodes: bool = False
    ) -> None:
        self.chunks, self.optimizer, self.ctx, self.timeout_s = chunks, optimizer, ctx, timeout_s
        self.nodes = Nodes.agree()
        # Folders of different attempts at the same step must not mix, and nobody is asked before a save begins.
        name = [uuid.uuid4().hex[:6]]
        dist.broadcast_object_list(name)
        self._attempts, self._number = name[0], 0
        self._places: list[int] | None = None
        self._pieces: list[Piece] = []
        self._random = RandomStates(ctx)
        self.shares = agree_on_shares(self._find_pieces(), self.nodes, on_nodes=on_nodes)
        self._staging: Staging | None = None
        self._job: _Job | None = None
        self.after: Callable[[Path, bool], None] | None = None
        """Tidies up behind a checkpoint, given its path and whether it is local. Called in a thread of the rank that published it, once
        every node has its part."""

    @property
    def is_busy(self) -> bool:
        """Is a save under way?"""
        return self._job is not None

    @property
    def attempts(self) -> str:
        """Begins the last part of the names of this saver's unfinished folders: what else is unfinished, nobody is writing."""
        return f"{self._attempts}-"

    @property
    def next_save(self) -> str:
        """A name that no other save has, the same on every rank."""
        return f"{self.attempts}{self._number + 1}"

    @property
    def host_bytes(self) -> int:
        """Host memory that saving takes on this rank."""
        return self._memory().num_bytes

    def warm_up(self) -> None:
        """Take the memory now, rather than in the first save."""
        self._memory()

    def begin(self, path: Path, state: Mapping[str, Any], *, is_local: bool = False) -> None:
        """Copy the values of now, and write them to `path`: the durable one, or this node's with what it needs besides."""
        assert self._job is None, "a save is under way: wait for it"
        began = time.perf_counter()
        pieces = self._find_pieces()
        self._random.refresh()
        everything = self._describe(path, state)
        self._memory().fill(pieces)
        unfinished = path.with_name(f"{path.name}.{self.next_save}{folders.UNFINISHED}")
        self._number += 1
        job = _Job(path, unfinished, json.dumps(everything, indent=1), is_local, began, stall_s=time.perf_counter() - began)
        self._job = job
        self._start(job, self._write, "writing")

    def progress(self) -> list[int]:
        """Two numbers for `advance`, whose largest over all ranks it wants: has this rank failed, and how far has it come (negative)."""
        job = self._job
        return [0, 0] if job is None else [int(job.error is not None), -job.stage]

    def advance(self, agreed: Sequence[int]) -> Outcome | None:
        """Go on with what all ranks have come to. Returns how the save ended when it has."""
        job = self._job
        if job is None:
            return None
        has_failed, stage = bool(agreed[0]), -agreed[1]
        if has_failed:
            return self._fail(job)
        if stage == _TIDIED:
            self._job = None
            return Outcome(job.path, job.is_local, job.stall_s, time.perf_counter() - job.began)
        if stage == _PUBLISHED and not job.is_tidying:
            job.is_tidying = True
            if self._publishes(job):
                self._start(job, self._tidy, "tidying up behind")
            else:
                job.stage = _TIDIED
        if stage == _WRITTEN and not job.is_publishing:
            job.is_publishing = True
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, job.files)
            written = {name: entry for share in shares for name, entry in share.items()}
            if self._publishes(job):
                self._start(job, lambda j: self._publish(j, written), "publishing")
            else:
                job.stage = _PUBLISHED
        return None

    def wait(self) -> Outcome | None:
        """Until the save that is under way has ended; None when there is none."""
        outcome = None
        while self._job is not None:
            if self._job.thread is not None:
                self._job.thread.join()
            outcome = self.advance(self._agree())
        return outcome

    def _agree(self) -> list[int]:
        values = torch.tensor(self.progress(), device=self.ctx.device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return [int(v) for v in values.tolist()]

    def _memory(self) -> Staging:
        if self._staging is None:
            self._staging = Staging(self.shares, self.ctx.device)
        return self._staging

    def _find_pieces(self) -> list[Piece]:
        """Those of the last save, as long as the model's and the optimizer's tensors lie where they lay then."""
        places = self._where()
        if places is None or places != self._places:
            pieces = pieces_of(self.chunks, self.optimizer, self.ctx)
            found = [*pieces.model, *pieces.optimizer, self._random.piece]
            same = not self._pieces or [(p.key, p.box) for p in found] == [(p.key, p.box) for p in self._pieces]
            assert same, "the model has other tensors than at its first save"
            # Finding them may have made the optimizer's states.
            self._pieces, self._places = found, self._where()
        return self._pieces

    def _where(self) -> list[int] | None:
        """Addresses of all tensors; None where they cannot be told without gathering parameters."""
        parameters = [p for chunk in self.chunks for p in chunk.parameters()]
        if any(is_sharded(p) for p in parameters):
            return None
        states = [] if self.optimizer is None else optimizer_state.tensors(self.optimizer)
        return [t.data_ptr() for t in (*parameters, *(state.tensor for state in states))]

    def _describe(self, path: Path, state: Mapping[str, Any]) -> dict[str, Any]:
        held = list(self.shares.held)
        return {
            "format": folders.FORMAT,
            "megavlm_version": megavlm.__version__,
            "modules": dict.fromkeys(held, path.name),
            **state,
            "held": held,
            "grid": grid_of(self.ctx),
            "has_optimizer": self.optimizer is not None,
            "optimizer_step": 0 if self.optimizer is None else optimizer_state.read_step(self.optimizer),
        }

    def _publishes(self, job: _Job) -> bool:
        rank = self.ctx.rank
        return rank == (self.nodes.leader(rank) if job.is_local else 0)

    def _start(self, job: _Job, work: Callable[[_Job], None], what: str) -> None:
        """Do this part of the job in a thread, with `timeout_s` of its own, and count it done."""

        def run() -> None:
            try:
                with watchdog(f"{what} {job.path}", self.timeout_s):
                    work(job)
            except Exception as error:
                if not job.is_tidying:
                    job.error = error
                    return
                # The checkpoint is good whatever becomes of older ones.
                why = f"{type(error).__name__}: {error}"
                _log.warning("behind %s older checkpoints could not be deleted: %s", job.path.name, why)
            job.stage += 1

        job.thread = threading.Thread(target=run, name=f"checkpoint {what}", daemon=True)
        job.thread.start()

    def _tidy(self, job: _Job) -> None:
        if self.after is not None:
            self.after(job.path, job.is_local)

    def _write(self, job: _Job) -> None:
        job.unfinished.mkdir(parents=True, exist_ok=True)
        for number, (name, memory) in enumerate(self._memory().files.items()):
            if number == 0 or job.is_local:
                job.files[name] = _write_file(job.unfinished / name, memory, job)

    def _publish(self, job: _Job, written: Mapping[str, Any]) -> None:
        files = self.shares.node_files() if job.is_local else self.shares.files()
        folder = job.unfinished
        for name, size in files.items():
            _check_visible(folder / name, size)
        entries = {name: written[name] for name in files}
        texts = {**(self.shares.node_index if job.is_local else self.shares.index), folders.STATE: job.state.encode()}
        for name, data in texts.items():
            folders.write_new(folder / name, data)
            entries[name] = folders.checksum(folder / name)
        manifest = {"files": dict(sorted(entries.items()))}
        folders.write_new(folder / folders.MANIFEST, json.dumps(manifest, indent=1).encode())
        folders.publish(folder, job.path)

    def _fail(self, job: _Job) -> Outcome:
        """Some rank could not do its part: all stop, and what was written goes."""
        job.is_cancelled = True
        if job.thread is not None:
            job.thread.join()
        own = None if job.error is None else (self.ctx.rank, getattr(job.error, "errno", None), str(job.error), type(job.error).__name__)
        errors: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, own)
        if self._publishes(job):
            shutil.rmtree(job.unfinished, ignore_errors=True)
            if job.is_local and job.stage == _PUBLISHED:
                # This node was quicker than the one that failed. Its part is of no use, and takes the next one's room.
                shutil.rmtree(job.path, ignore_errors=True)
        rank, number, text, kind = next(e for e in errors if e is not None)
        why = text if number is not None or kind == "CheckpointError" else f"{kind}: {text}"
        self._job = None
        seconds = time.perf_counter() - job.began
        message = f"saving {job.path}: rank {rank} could not write: {why}"
        return Outcome(job.path, job.is_local, job.stall_s, seconds, message, any(e is not None and e[1] in FULL for e in errors))


def _write_file(file: Path, memory: torch.Tensor, job: _Job) -> dict[str, Any]:
    """Write and fsync; returns the file's entry in the manifest."""
    data, summing = memory.numpy().data, folders.hasher()
    handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        for start in range(0, len(data), _SLICE_BYTES):
            if job.is_cancelled:
                break
            part = data[start : start + _SLICE_BYTES]
            summing.update(part)
            while part:
                part = part[os.write(handle, part) :]
        os.fsync(handle)
    finally:
        os.close(handle)
    return {"bytes": len(data), folders.CHECKSUM: summing.hexdigest()}


def _check_visible(file: Path, size: int) -> None:
    found = file.stat().st_size if file.is_file() else None
    if found != size:
        seen = "is not there" if found is None else f"has {found} bytes instead of {size}"
        raise OSError(errno.EIO, f"{file.name} {seen}, as rank 0 sees it: every node must see the same run.dir")
