"""The order of one source's rows: every epoch another permutation, each row exactly once, any place computed by itself."""

from __future__ import annotations

import hashlib
from math import isqrt

import numpy as np
import numpy.typing as npt

FEISTEL_ROWS = 2**17
"""From this many rows on, places are computed in blocks instead of permuting all rows: 8 bytes and 70 ns a row would be 80 GB and
many minutes for 1e9 rows, and restoring a cursor must take less than a second."""

BLOCK_ROWS = 4096
"""Places that are computed together."""

FEISTEL_ROUNDS = 8


class OrderError(ValueError):
    """A source that has no order."""


class SourceOrder:
    """The endless order of one source.

    Below FEISTEL_ROWS rows the permutation is the argsort of 64-bit words of PCG64 seeded by (seed, source name, epoch). It uses
    bit-generator output alone, whose stream NumPy keeps stable over versions (NEP 19), which its `permutation` does not promise: a
    cursor stays valid after an upgrade. From FEISTEL_ROWS on it is a Feistel network (Luby and Rackoff, SIAM J. Comput. 17(2), 1988)
    over pairs of numbers below a = ceil(sqrt(rows)), with addition modulo a instead of XOR, so that hardly any number lies outside;
    those that do are sent through again until they lie inside ("cycle walking", Black and Rogaway, CT-RSA 2002).

    Adding or removing another source does not change this one's order.

    Memory: 8 bytes a row for the epochs in use; with the Feistel network a few blocks of BLOCK_ROWS.

    Raises:
        OrderError: the source has no row.
    """

    def __init__(self, name: str, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise OrderError(f"source {name!r} has no sample, so none can be drawn: remove it from the mixture or set its weight to 0")
        self.name, self.num_rows, self.seed = name, num_rows, seed
        self._block_rows = num_rows if num_rows < FEISTEL_ROWS else BLOCK_ROWS
        self._blocks: dict[tuple[int, int], npt.NDArray[np.int64]] = {}

    def row(self, number: int) -> int:
        """Row of the source's `number`-th draw (counted from 0, over all epochs); random access."""
        epoch, position = divmod(number, self.num_rows)
        block, place = divmod(position, self._block_rows)
        rows = self._blocks.get((epoch, block))
        if rows is None:
            rows = self._make(epoch, block)
            # Samples of the block before may still wait in the packer's window; older ones are made again when asked for.
            self._blocks = dict([*self._blocks.items(), ((epoch, block), rows)][-2:])
        return int(rows[place])

    def _make(self, epoch: int, block: int) -> npt.NDArray[np.int64]:
        key = hashlib.sha256(f"megavlm order 1|{self.seed}|{self.name}|{epoch}".encode()).digest()
        if self._block_rows == self.num_rows:
            return np.argsort(np.random.PCG64(int.from_bytes(key, "little")).random_raw(self.num_rows), kind="stable")
        first = block * self._block_rows
        return feistel(np.arange(first, min(first + self._block_rows, self.num_rows)), self.num_rows, key)


def feistel(numbers: npt.NDArray[np.integer], size: int, key: bytes) -> npt.NDArray[np.int64]:
    """Images of `numbers` under a permutation of 0 .. size - 1 that `key` (32 bytes) chooses. Deterministic on every machine."""
    side = np.uint64(isqrt(size - 1) + 1)
    words = np.random.PCG64(int.from_bytes(key, "little")).random_raw(FEISTEL_ROUNDS)
    values = np.asarray(numbers, dtype=np.uint64)
    outside = np.ones(values.shape, dtype=np.bool_)
    while outside.any():
        left, right = np.divmod(values[outside], side)
        for word in words:
            left, right = right, (left + _mixed(right ^ word) % side) % side
        values[outside] = left * side + right
        outside = values >= np.uint64(size)
    return values.astype(np.int64)


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): every bit of the input reaches every bit of the output."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))
