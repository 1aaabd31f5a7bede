"""How each weight of ours is made of Hugging Face weights, and the way back: one table for import and export.

A `Link` says of which rows of which Hugging Face tensors ours consists, in order. That is enough to read any slice without the whole
tensor, to write the tensors back bit for bit, and to check every shape. Which links a model has is said by its family
(`families/`), with the names that transformers 5 writes to the disk.

Shape legend: D width, H heads, G key/value heads, K head dim, F inner width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod


@dataclass(frozen=True)
class Part:
    """A Hugging Face tensor."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Run:
    """Rows `start` .. `start + length` of a link's part number `part`."""

    part: int
    start: int
    length: int


@dataclass(frozen=True)
class Link:
    """One tensor of ours and the Hugging Face tensors that it is made of.

    Parts are seen as (rows, everything else), and ours is the rows of `runs` one after another, in shape `shape`.
    """

    key: str
    """Checkpoint key of ours."""
    parts: tuple[Part, ...]
    runs: tuple[Run, ...]
    shape: tuple[int, ...]
    """Of ours, whole; rows of padding (vocabulary) not counted."""
    aliases: tuple[str, ...] = ()
    """Hugging Face names under which some folders hold the same tensor again (a tied head); never written."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(part.name for part in self.parts)


def plain(key: str, name: str, shape: Sequence[int], *, theirs: Sequence[int] | None = None, aliases: tuple[str, ...] = ()) -> Link:
    """The same numbers; `theirs` where Hugging Face has them in another shape (a convolution's weight)."""
    shape, theirs = tuple(shape), tuple(theirs or shape)
    assert prod(shape) == prod(theirs) and (shape[0] == theirs[0] or shape[0] == 1 or theirs[0] == 1), (key, shape, theirs)
    return Link(key, (Part(name, theirs),), (Run(0, 0, theirs[0]),), shape, aliases)


def stacked(key: str, names: Sequence[str], rows: Sequence[int], *rest: int) -> Link:
    """Tensors one over the other: gate over up. `rest` are the dimensions behind the rows."""
    parts = tuple(Part(name, (n, *rest)) for name, n in zip(names, rows, strict=True))
    return Link(key, parts, tuple(Run(i, 0, n) for i, n in enumerate(rows)), (sum(rows), *rest))


def qkv(key: str, names: Sequence[str], heads: int, groups: int, head_dim: int, *rest: int) -> Link:
    """Query heads of a group, then its key, then its value, group after group, as megatron-core wants them.

    `names` are three tensors (query, key, value), or one that holds the three one over the other. `rest` is (D,), or empty for a bias.
    """
    rows = (heads * head_dim, groups * head_dim, groups * head_dim)
    parts: tuple[Part, ...]
    if len(names) == 1:
        parts, starts = (Part(names[0], (sum(rows), *rest)),), (0, rows[0], rows[0] + rows[1])
        numbers = (0, 0, 0)
    else:
        parts, starts, numbers = tuple(Part(n, (r, *rest)) for n, r in zip(names, rows, strict=True)), (0, 0, 0), (0, 1, 2)
    own = (heads // groups * head_dim, head_dim, head_dim)
    runs = tuple(Run(numbers[x], starts[x] + group * own[x], own[x]) for group in range(groups) for x in range(3))
    return Link(key, parts, runs, (sum(rows), *rest))


def prefixed(links: Sequence[Link], ours: str, theirs: str) -> list[Link]:
    """The same links with a prefix before our keys and one before Hugging Face's names."""
    return [
        replace(
            link,
            key=ours + link.key,
            parts=tuple(replace(part, name=theirs + part.name) for part in link.parts),
            aliases=tuple(theirs + alias for alias in link.aliases),
        )
        for link in links
    ]
