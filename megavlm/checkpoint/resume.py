"""Which checkpoint a run goes on from: the newest good one of both tiers. Never a damaged one, and never silently the beginning."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.reader import read_metadata
from megavlm.checkpoint.shares import Nodes
from megavlm.checkpoint.store import everywhere, verify_together
from megavlm.parallel.reductions import from_rank_zero

LOCAL = "local"
"""In the state of a node's own checkpoint: what must be the same for it to be of use."""
SAVE = "save"
"""In the same state: which save it was, the same on every node."""
RUN_ID = "run-id"
"""File beside the checkpoints: a run that begins anew in the same folder must not take an earlier one's local checkpoints for its own."""


class Found(NamedTuple):
    """Where a run goes on; the same on every rank but for `path`, which in the local tier is the node's own."""

    path: Path | None
    """None: from the beginning."""
    state: dict[str, Any]
    warnings: list[str]
    """What was passed over, and why."""


class _Candidate(NamedTuple):
    step: int
    name: str
    is_local: bool
    problem: str | None


def run_id(run_dir: str | Path) -> str:
    """The run's own name for itself, given when it is first asked for. Every rank calls this."""

    def read() -> str:
        file = Path(run_dir) / folders.CHECKPOINTS / RUN_ID
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            folders.write_bytes(file, uuid.uuid4().hex.encode())
        return file.read_text(encoding="utf-8").strip()

    found = everywhere(lambda: read() if dist.get_rank() == 0 else None, "the run's folder")
    return str(from_rank_zero(found))


def find(run_dir: str | Path, local_dir: Path | None, fits: Mapping[str, Any] | None) -> Found:
    """The newest checkpoint whose files are all as they were written. Every rank calls this, and reads its share of them.

    `local_dir` is this node's folder of the run (or None); its checkpoints are taken where each node has its part and each says of itself
    what `fits` says. Damaged checkpoints of the durable tier are renamed, and told of in `warnings`.

    Raises:
        CheckpointError: there are checkpoints, and no good one.
    """
    rank, world = dist.get_rank(), range(dist.get_world_size())
    nodes = Nodes.agree()
    candidates, lost = from_rank_zero(_durable(run_dir) if rank == 0 else None)
    if local_dir is not None and fits is not None:
        candidates = sorted([*candidates, *_local(local_dir, fits, nodes)], key=lambda c: (c.step, c.is_local))
    warnings: list[str] = [lost] if lost else []
    damaged: list[str] = []
    for candidate in reversed(candidates):
        root = Path(run_dir) if not candidate.is_local or local_dir is None else local_dir
        path = root / folders.CHECKPOINTS / candidate.name
        problem = candidate.problem
        if problem is None:
            try:
                verify_together(path, nodes.ranks_beside(rank) if candidate.is_local else world)
                state = everywhere(lambda at=path: _opened(at, rank == nodes.leader(rank)), f"loading {path}")
            except CheckpointError as error:
                problem = str(error)
            else:
                if rank == 0:
                    _set_aside(Path(run_dir) / folders.CHECKPOINTS, damaged, path)
                return Found(path, state, [f"{warning}; going on from {candidate.name} instead" for warning in warnings])
        kind = "the local checkpoint" if candidate.is_local else "the checkpoint"
        warnings.append(f"{kind} {candidate.name} is damaged and not used: {problem}")
        if not candidate.is_local:
            damaged.append(candidate.name)
    if damaged or lost:
        raise CheckpointError(
            f"{Path(run_dir) / folders.CHECKPOINTS} holds no good checkpoint to go on from: {'; '.join(warnings)}. Put a good one back, or "
            "use another run.dir to start from the beginning"
        )
    return Found(None, {}, warnings)


def _opened(path: Path, reads_index: bool) -> dict[str, Any]:
    """Its state. One rank of each node reads the index too: checksums do not tell of one that was exchanged together with them."""
    if reads_index:
        read_metadata(path)
    return folders.read_state(path)


def _durable(run_dir: str | Path) -> tuple[list[_Candidate], str | None]:
    """By ascending step; and what is wrong with `latest`."""
    folders.recover(run_dir)
    paths = folders.named(run_dir)
    found = [_Candidate(folders.step_and_stage(p.name)[0], p.name, False, folders.problem(p)) for p in paths]
    latest = folders.latest(run_dir)
    lost = None if latest is None or any(p.name == latest for p in paths) else f"the newest checkpoint, {latest}, is gone"
    return found, lost


def _local(local_dir: Path, fits: Mapping[str, Any], nodes: Nodes) -> list[_Candidate]:
    """Those that every node has its part of: of one save, not of two at the same step."""
    rank, own = dist.get_rank(), None
    if nodes.leader(rank) == rank:
        own = set()
        for path in folders.named(local_dir):
            with contextlib.suppress(CheckpointError):
                state = folders.read_state(path)
                if state.get(LOCAL) == dict(fits):
                    own.add((path.name, state.get(SAVE)))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    everywhere_there = set.intersection(*(names for names in gathered if names is not None))
    return [_Candidate(folders.step_and_stage(name)[0], name, True, None) for name, _ in everywhere_there]


def _set_aside(root: Path, damaged: list[str], chosen: Path) -> None:
    """Rename what is damaged, and let `latest` name what is used."""
    for name in damaged:
        with contextlib.suppress(OSError):
            folders.set_damaged_aside(root / name)
    if damaged and chosen.parent == root:
        with contextlib.suppress(OSError):
            folders.write_bytes(root / folders.LATEST, f"{chosen.name}\n".encode())
