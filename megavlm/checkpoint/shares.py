"""Which rank writes what: every box of every tensor once, the bytes spread evenly over the ranks that hold it.

A rank's share is one file whose layout is known beforehand (`records`). Where checkpoints are kept on the nodes' own disks as well, each
node needs everything that its ranks hold: what others write of that, its ranks write into a second file.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megavlm.checkpoint.boxes import Box, tile_exactly
from megavlm.checkpoint.errors import CheckpointError, some
from megavlm.checkpoint.index import Placed, index_files
from megavlm.checkpoint.pieces import Piece
from megavlm.checkpoint.records import ALIGNMENT_BYTES, record_of


class Entry(NamedTuple):
    """A piece without its values."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    box: Box
    is_copy: bool

    @property
    def num_bytes(self) -> int:
        """Of its values."""
        return self.box.numel * self.dtype.itemsize


class Nodes(NamedTuple):
    """Which ranks share a machine's disk."""

    of_rank: tuple[int, ...]
    """Number of each rank's node."""
    names: tuple[str, ...]
    """Of each node, fit for a folder: a machine's is the same at every start, and no two are alike."""

    @property
    def num(self) -> int:
        """How many there are."""
        return max(self.of_rank) + 1

    def leader(self, rank: int) -> int:
        """The rank that does what is to be done once on `rank`'s node."""
        return self.of_rank.index(self.of_rank[rank])

    def name(self, rank: int) -> str:
        """Of `rank`'s node."""
        return self.names[self.of_rank[rank]]

    def ranks_beside(self, rank: int) -> list[int]:
        """All ranks of `rank`'s node."""
        return [r for r, node in enumerate(self.of_rank) if node == self.of_rank[rank]]

    @classmethod
    def agree(cls) -> Nodes:
        """By SLURM's or torchrun's word, else by the machine's name. Every rank calls this."""
        machine = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        own = os.environ.get("SLURM_NODEID") or os.environ.get("GROUP_RANK") or machine
        told: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(told, (own, re.sub(r"[^A-Za-z0-9._-]", "_", machine)))
        machines: dict[str, str] = {}
        for node, name in told:
            machines.setdefault(node, name)
        order, names = list(machines), list(machines.values())
        unlike = [name if names.count(name) == 1 else f"{name}.node{number}" for number, name in enumerate(names)]
        return cls(tuple(order.index(node) for node, _ in told), tuple(unlike))


@dataclass(frozen=True)
class Shares:
    """What every rank writes."""

    rank: int
    nodes: Nodes
    held: tuple[str, ...]
    """Top-level modules of the checkpoint."""
    entries: tuple[Entry, ...]
    """Of this rank, in the order of its pieces."""
    written: tuple[tuple[Entry, ...], ...]
    """Each rank's share."""
    beside: tuple[tuple[Entry, ...], ...]
    """Each rank's part of what its node needs besides; () each without a local tier."""

    def own_files(self) -> list[tuple[str, list[tuple[int, int]], int]]:
        """(name, [number of a piece, where its record begins], bytes) of this rank's file, and of its second one where it has that."""
        number = {_identity(entry): at for at, entry in enumerate(self.entries)}
        found = []
        for name, share in self._files_of(self.rank):
            placed = list(_placed(name, share))
            places = [(number[_identity(entry)], p.start) for entry, p in zip(share, placed, strict=True)]
            found.append((name, places, _end(placed)))
        return found

    def files(self) -> dict[str, int]:
        """Name -> bytes of all ranks' files."""
        return {name: _end(_placed(name, share)) for r in range(len(self.written)) for name, share in self._files_of(r)[:1]}

    def node_files(self) -> dict[str, int]:
        """Name -> bytes of the files of this rank's node."""
        beside = self.nodes.ranks_beside(self.rank)
        return {name: _end(_placed(name, share)) for r in beside for name, share in self._files_of(r)}

    @cached_property
    def index(self) -> dict[str, bytes]:
        """The files beside the shards of all ranks."""
        return index_files(p for r in range(len(self.written)) for name, share in self._files_of(r)[:1] for p in _placed(name, share))

    @cached_property
    def node_index(self) -> dict[str, bytes]:
        """The files beside the shards of this rank's node."""
        beside = self.nodes.ranks_beside(self.rank)
        return index_files(p for r in beside for name, share in self._files_of(r) for p in _placed(name, share))

    def _files_of(self, rank: int) -> list[tuple[str, tuple[Entry, ...]]]:
        """Files of a rank; one that writes nothing has none, so that its first may be missing but not its second alone."""
        first = (f"__{rank}_0.distcp", self.written[rank])
        return [first, (f"__{rank}_1.distcp", self.beside[rank])] if self.beside[rank] else [first]


def agree_on_shares(pieces: Sequence[Piece], nodes: Nodes, *, on_nodes: bool) -> Shares:
    """Every rank calls this with its pieces. `on_nodes`: nodes keep checkpoints of their own.

    Raises:
        CheckpointError: the ranks' pieces do not make whole tensors.
    """
    own = tuple(Entry(p.key, p.dtype, p.shape, p.box, p.is_copy) for p in pieces)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, own)
    by_rank: dict[int, tuple[Entry, ...]] = dict(enumerate(gathered))
    written = _deal({rank: [e for e in entries if not e.is_copy] for rank, entries in by_rank.items()}, set())
    _check(written)
    beside: dict[int, tuple[Entry, ...]] = {}
    for node in range(nodes.num if on_nodes else 0):
        ranks = [r for r, of in enumerate(nodes.of_rank) if of == node]
        there = {_identity(entry) for r in ranks for entry in written[r]}
        beside |= _deal({r: by_rank[r] for r in ranks}, there)
    held = sorted({e.key.split(".", 1)[0] for entries in by_rank.values() for e in entries} - {"optimizer", "random"})
    return Shares(dist.get_rank(), nodes, tuple(held), own, tuple(written[r] for r in by_rank), tuple(beside.get(r, ()) for r in by_rank))


def _identity(entry: Entry) -> tuple[str, Box]:
    return entry.key, entry.box


def _deal(held: Mapping[int, Iterable[Entry]], done: set[tuple[str, Box]]) -> dict[int, tuple[Entry, ...]]:
    """Rank -> what it writes of what the ranks hold and nobody has `done`; the largest first, to whom has the least. The same anywhere."""
    holders: dict[tuple[str, Box], list[int]] = {}
    entries: dict[tuple[str, Box], Entry] = {}
    for rank, own in held.items():
        for entry in own:
            identity = _identity(entry)
            if identity not in done:
                holders.setdefault(identity, []).append(rank)
                entries.setdefault(identity, entry)
    load = dict.fromkeys(held, 0)
    writer: dict[tuple[str, Box], int] = {}
    for identity in sorted(entries, key=lambda i: -entries[i].num_bytes):
        rank = min(holders[identity], key=lambda r: (load[r], r))
        writer[identity] = rank
        load[rank] += entries[identity].num_bytes
    return {rank: tuple(entries[i] for i in entries if writer[i] == rank) for rank in held}


def _check(written: Mapping[int, Sequence[Entry]]) -> None:
    """Each rank looks at some of the tensors: all of each must be written, and nothing twice."""
    by_key: dict[str, list[Entry]] = {}
    for share in written.values():
        for entry in share:
            by_key.setdefault(entry.key, []).append(entry)
    mine = sorted(by_key)[dist.get_rank() :: dist.get_world_size()]
    bad = [key for key in mine if len({(e.shape, e.dtype) for e in by_key[key]}) > 1]
    bad += [key for key in mine if key not in bad and not tile_exactly(by_key[key][0].shape, [e.box for e in by_key[key]])]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, bad)
    if wrong := sorted(key for keys in found for key in keys):
        raise CheckpointError(f"the ranks' parts of {some(wrong)} do not make a whole: nothing is saved")


def _placed(file: str, share: Iterable[Entry]) -> Iterable[Placed]:
    start = 0
    for entry in share:
        length = record_of(entry.dtype, entry.box.sizes).length
        yield Placed(entry.key, entry.dtype, entry.shape, entry.box, file, start, length)
        start += -(-length // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _end(placed: Iterable[Placed]) -> int:
    end = 0
    for entry in placed:
        end = entry.start + entry.length
    return end
