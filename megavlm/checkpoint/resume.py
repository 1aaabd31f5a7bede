"""Which checkpoint a run goes on from: the newest good one of both tiers. Never a damaged one, and never silently the beginning.

Damaged is what two looks found wrong. What cannot be read is passed over as well, but keeps its name: when the file server is well
again it is as good as it was.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import CheckpointError, Unreadable, some
from megavlm.checkpoint.patience import MISSING, patiently
from megavlm.checkpoint.reader import read_metadata
from megavlm.checkpoint.shares import Nodes
from megavlm.checkpoint.store import everywhere, verify_together
from megavlm.parallel.reductions import from_rank_zero

_log = logging.getLogger(__name__)

LOCAL = "local"
"""In the state of a node's own checkpoint: what must be the same for it to be of use."""
NODE = "node"
"""Among that, the node's number: with other places of the ranks it holds what others need."""
SAVE = "save"
"""In the same state: which save it was, the same on every node."""
RUN_ID = "run-id"
"""File beside the checkpoints: a run that begins anew in the same folder must not take an earlier one's local checkpoints for its own."""

_IS_RUN_ID = re.compile("[0-9a-f]{32}")

SECOND_LOOK_S = 0.5
"""From the first word of something that is missing or malformed to the second look: a file server may have been about to tell."""


DAMAGED, UNREADABLE, INCOMPLETE = "damaged_checkpoint", "unreadable_checkpoint", "incomplete_local_checkpoint"
"""Kinds of `PassedOver`."""


class PassedOver(NamedTuple):
    """A checkpoint that is not used."""

    kind: str
    text: str
    """Which, and why."""


class Found(NamedTuple):
    """Where a run goes on; the same on every rank but for `path`, which in the local tier is the node's own."""

    path: Path | None
    """None: from the beginning."""
    state: dict[str, Any]
    warnings: list[PassedOver]
    """What was passed over."""


class _Candidate(NamedTuple):
    step: int
    name: str
    is_local: bool
    problem: str | None = None
    """Why nobody has to look at it."""


def run_id(run_dir: str | Path) -> str:
    """The run's own name for itself, given when it is first asked for, and anew where its file is damaged. Every rank calls this."""

    def read() -> str:
        file = Path(run_dir) / folders.CHECKPOINTS / RUN_ID
        with contextlib.suppress(*MISSING):
            known = patiently(file.read_bytes, file).decode(errors="replace").strip()
            if _IS_RUN_ID.fullmatch(known):
                return known
            _log.warning("%s is damaged: the run gets a new one, and takes no earlier incident or local checkpoint for its own", file)
        own = uuid.uuid4().hex
        file.parent.mkdir(parents=True, exist_ok=True)
        folders.write_bytes(file, own.encode())
        return own

    found = everywhere(lambda: read() if dist.get_rank() == 0 else None, "the run's folder")
    return str(from_rank_zero(found))


def find(run_dir: str | Path, local_dir: Path | None, fits: Mapping[str, Any] | None) -> Found:
    """The newest checkpoint whose files are all as they were written. Every rank calls this, and reads its share of them.

    `local_dir` is the run's folder in the local tier (or None), with a folder for each node in it; its checkpoints are taken where each
    node has its part and each says of itself what `fits` says. Damaged checkpoints of the durable tier are renamed. `warnings` tells of
    them, of those that cannot be read, and of local ones that lack a node's part.

    Raises:
        Unreadable: there are checkpoints, and none that can be read now.
        CheckpointError: there are checkpoints, and no good one.
    """
    rank, world = dist.get_rank(), range(dist.get_world_size())
    nodes = Nodes.agree()
    candidates, lost = from_rank_zero(everywhere(lambda: _durable(run_dir) if rank == 0 else None, "the run's checkpoints"))
    own_dir = None if local_dir is None else local_dir / nodes.name(rank)
    if own_dir is not None and fits is not None:
        candidates = sorted([*candidates, *_local(own_dir, fits, nodes)], key=lambda c: (c.step, c.is_local))
    warnings = [PassedOver(DAMAGED, lost)] if lost else []
    damaged: list[str] = []
    unread: list[str] = []
    for candidate in reversed(candidates):
        root = Path(run_dir) if not candidate.is_local or own_dir is None else own_dir
        path = root / folders.CHECKPOINTS / candidate.name
        kind = f"the local checkpoint {candidate.name}" if candidate.is_local else f"the checkpoint {candidate.name}"
        if candidate.problem is not None:
            warnings.append(PassedOver(INCOMPLETE, f"{kind} is not used: {candidate.problem}"))
            continue
        try:
            state = everywhere(lambda at=path: _opened(at, rank == nodes.leader(rank)), f"loading {path}")
            verify_together(path, nodes.ranks_beside(rank) if candidate.is_local else world)
        except Unreadable as error:
            warnings.append(PassedOver(UNREADABLE, f"{kind} cannot be read, and stays as it is: {error}"))
            unread += [] if candidate.is_local else [candidate.name]
        except CheckpointError as error:
            warnings.append(PassedOver(DAMAGED, f"{kind} is damaged and not used: {error}"))
            damaged += [] if candidate.is_local else [candidate.name]
        else:
            if rank == 0:
                _set_aside(Path(run_dir) / folders.CHECKPOINTS, damaged, path)
            return Found(path, state, [w._replace(text=f"{w.text}; going on from {candidate.name} instead") for w in warnings])
    _refuse(Path(run_dir) / folders.CHECKPOINTS, warnings, bool(damaged or lost), bool(unread))
    return Found(None, {}, warnings)


def _refuse(root: Path, warnings: list[PassedOver], is_lost: bool, is_unread: bool) -> None:
    """Raise where there are checkpoints, but none to go on from."""
    told = "; ".join(warning.text for warning in warnings)
    if is_unread:
        raise Unreadable(f"{root} holds no checkpoint that can be read now: {told}. Start again when the disk is well")
    if is_lost:
        raise CheckpointError(
            f"{root} holds no good checkpoint to go on from: {told}. Put a good one back, or use another run.dir to start "
            "from the beginning"
        )


def _opened(path: Path, reads_index: bool) -> dict[str, Any]:
    """Its state. One rank of each node reads the index too: checksums do not tell of one that was exchanged together with them."""

    def look() -> dict[str, Any]:
        if reads_index:
            read_metadata(path)
        return folders.read_state(path)

    try:
        return look()
    except Unreadable:
        raise
    except CheckpointError:
        time.sleep(SECOND_LOOK_S)
        return look()


def _durable(run_dir: str | Path) -> tuple[list[_Candidate], str | None]:
    """By ascending step; and what is wrong with `latest`."""
    patiently(lambda: folders.recover(run_dir), run_dir)
    names = [path.name for path in folders.named(run_dir)]
    latest = folders.latest(run_dir)
    lost = None if latest is None or latest in names else f"the newest checkpoint, {latest}, is gone"
    return [_Candidate(folders.step_and_stage(name)[0], name, is_local=False) for name in names], lost


def _local(own_dir: Path, fits: Mapping[str, Any], nodes: Nodes) -> list[_Candidate]:
    """Those that some node has its part of: of one save, not of two at the same step."""
    rank, own = dist.get_rank(), None
    if nodes.leader(rank) == rank:
        own = set()
        with contextlib.suppress(Unreadable):
            for path in folders.named(own_dir):
                with contextlib.suppress(CheckpointError):
                    state = folders.read_state(path)
                    if state.get(LOCAL) == {**fits, NODE: nodes.of_rank[rank]}:
                        own.add((path.name, state.get(SAVE)))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    by_node = {nodes.name(r): found for r, found in enumerate(gathered) if found is not None}
    candidates: dict[str, _Candidate] = {}
    for name, save in sorted(set.union(*by_node.values()), key=str):
        lacking = [node for node, found in by_node.items() if (name, save) not in found]
        problem = f"nothing of it is left on {some(lacking)}" if lacking else None
        if name not in candidates or problem is None:
            candidates[name] = _Candidate(folders.step_and_stage(name)[0], name, True, problem)
    return list(candidates.values())


def _set_aside(root: Path, damaged: list[str], chosen: Path) -> None:
    """Rename what is damaged, and let `latest` name what is used."""
    for name in damaged:
        with contextlib.suppress(OSError):
            folders.set_damaged_aside(root / name)
    if damaged and chosen.parent == root:
        with contextlib.suppress(OSError):
            folders.write_bytes(root / folders.LATEST, f"{chosen.name}\n".encode())
