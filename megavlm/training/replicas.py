"""Ranks that hold copies of the same parameters compare them: hardware that computes wrongly, once, is heard of no other way."""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megavlm.checkpoint.pieces import Piece, pieces_of
from megavlm.config.exits import Exit
from megavlm.config.faults import FaultsConfig
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.hashes import content_hash
from megavlm.tracking.tracker import Tracker
from megavlm.training.build import StageModel
from megavlm.training.faults import TrainingFailure
from megavlm.training.incidents import IncidentLog
from megavlm.training.state import RunState

_TOLD_TENSORS, _TOLD_RANKS = 20, 8


@dataclass(frozen=True)
class Difference:
    """A tensor, or a rank's part of one, that is not the same on all ranks that hold it."""

    key: str
    """As in checkpoints; optimizer state begins with `optimizer.`."""
    groups: tuple[tuple[int, ...], ...]
    """Ranks with the same values, the most first."""

    def __str__(self) -> str:
        most, *others = (", ".join(map(str, ranks[:_TOLD_RANKS])) + (" ..." if len(ranks) > _TOLD_RANKS else "") for ranks in self.groups)
        return f"{self.key} on rank {' and rank '.join(others)} is not as on rank {most}"


@dataclass(frozen=True)
class Comparison:
    """What all ranks found, equal on each."""

    num_copies: int
    """Tensors or parts of tensors that more than one rank holds."""
    differences: tuple[Difference, ...]
    """The first of them."""
    num_differences: int
    hosts: dict[int, str]
    """Of the ranks that are not with the most."""


def compare_replicas(model: StageModel, ctx: ParallelContext) -> Comparison:
    """Compare parameters and optimizer state that several ranks hold, bit for bit, by their hashes; every rank calls this.

    What is a copy of what is said by the names and places that checkpoints give them: over data ranks everything that ZeRO does not split,
    over tensor ranks norms and modules that are whole there, over pipeline stages a tied embedding, experts over the ranks that share them.
    """
    pieces = [piece for part in pieces_of(model.chunks, model.optimizer, ctx) for piece in part]
    own_ids = torch.tensor([_identity(piece) for piece in pieces], dtype=torch.int64, device=ctx.device)
    # A rank that holds a tensor twice (several chunks of a pipeline) compares it with itself as well.
    ids = [found.cpu().numpy() for found in _gather(own_ids)]
    names, numbers = np.unique(np.concatenate(ids), return_counts=True)
    copied = set(names[numbers > 1].tolist())
    chosen = [piece for piece, name in zip(pieces, own_ids.tolist(), strict=True) if name in copied]
    if not copied:
        return Comparison(0, (), 0, {})
    hashes = [content_hash(piece.tensor).to(ctx.device) for piece in chosen]
    gathered = _gather(torch.stack(hashes) if hashes else own_ids.new_zeros(0))
    values: dict[int, dict[int, list[int]]] = {}
    for rank, (rank_ids, rank_hashes) in enumerate(zip(ids, gathered, strict=True)):
        for name, value in zip((i for i in rank_ids.tolist() if i in copied), rank_hashes.tolist(), strict=True):
            values.setdefault(name, {}).setdefault(value, []).append(rank)
    differing = {name: groups for name, groups in values.items() if len(groups) > 1}
    if not differing:
        return Comparison(len(copied), (), 0, {})
    return _describe(len(copied), differing, chosen)


def _identity(piece: Piece) -> int:
    """Equal on ranks that hold the same part of the same tensor."""
    text = repr((piece.key, piece.box.offset, piece.box.sizes))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _gather(own: torch.Tensor) -> list[torch.Tensor]:
    """Every rank's vector of int64, whose lengths may differ."""
    length = torch.tensor([own.numel()], dtype=torch.int64, device=own.device)
    lengths = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    numbers = [int(n.item()) for n in lengths]
    padded = torch.nn.functional.pad(own, (0, max(numbers) - own.numel()))
    found = [torch.empty_like(padded) for _ in numbers]
    dist.all_gather(found, padded)
    return [part[:n] for part, n in zip(found, numbers, strict=True)]


def _describe(num_copies: int, differing: dict[int, dict[int, list[int]]], chosen: Sequence[Piece]) -> Comparison:
    own_names = {_identity(piece): piece.key for piece in chosen}
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (socket.gethostname(), {name: own_names[name] for name in differing if name in own_names}))
    keys = {name: key for _, known in told for name, key in known.items()}
    found = []
    for name in sorted(differing, key=lambda n: keys[n]):
        groups = sorted((tuple(ranks) for ranks in differing[name].values()), key=lambda ranks: (-len(ranks), ranks))
        found.append(Difference(keys[name], tuple(groups)))
    odd = sorted({rank for difference in found for group in difference.groups[1:] for rank in group})
    return Comparison(num_copies, tuple(found[:_TOLD_TENSORS]), len(found), {rank: told[rank][0] for rank in odd})


def check_replicas(
    model: StageModel, ctx: ParallelContext, faults: FaultsConfig, state: RunState, tracker: Tracker, incidents: IncidentLog
) -> None:
    """Compare after step `state.step`, and tell of what differs.

    Raises TrainingFailure (exit code 79) for differences with faults.on_divergence=stop.
    """
    found = compare_replicas(model, ctx)
    every = faults.replica_hash_every_steps
    if not found.num_copies and state.step == every:
        tracker.message("faults.replica_hash_every_steps: no rank holds a copy of another's parameters in this layout, nothing is compared")
    if not found.differences:
        return
    hosts = ", ".join(f"rank {rank} is on {host}" for rank, host in list(found.hosts.items())[:_TOLD_RANKS])
    more = f", and {found.num_differences - 1} other tensors" if found.num_differences > 1 else ""
    text = (
        f"copies of parameters differ after step {state.step} (compared every {every} steps): {found.differences[0]}{more}; {hosts}. A "
        "rank computed wrongly, or its memory is damaged: look at its ECC errors, and take its node out"
    )
    incidents.add(
        {
            "kind": "divergence",
            "step": state.step,
            "stage": state.stage_names[-1],
            "num_tensors": found.num_differences,
            "tensors": {difference.key: [list(ranks) for ranks in difference.groups] for difference in found.differences},
            "hosts": {str(rank): host for rank, host in found.hosts.items()},
        }
    )
    if faults.on_divergence == "stop":
        raise TrainingFailure(text, Exit.REPLICAS_DIVERGED)
    tracker.incident("divergence", state.step, text)
