"""Numbers by way of a `Link`: any slice of ours out of Hugging Face's tensors, and Hugging Face's tensors out of ours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megavlm.checkpoint.hf.links import Link

Rows = Callable[[str, int, int], torch.Tensor]
"""(Hugging Face name, first row, one past the last row) -> those rows, in Hugging Face's shape."""


def to_ours(link: Link, read: Rows, where: Sequence[slice] | None = None) -> torch.Tensor:
    """The slice `where` of our tensor (None: all of it), reading only the rows that it is made of.

    `where` has a start and a stop for each dimension. Dimensions behind the first are cut after reading.
    """
    first, last = (0, link.shape[0]) if where is None else (where[0].start, min(where[0].stop, link.shape[0]))
    if link.parts[0].shape[0] != link.shape[0] and len(link.runs) == 1:
        whole = read(link.parts[0].name, 0, link.parts[0].shape[0]).reshape(link.shape)
        return whole if where is None else whole[tuple(where)]
    found, row = [], 0
    for run in link.runs:
        low, high = max(first, row), min(last, row + run.length)
        if low < high:
            begin = run.start + low - row
            found.append(read(link.parts[run.part].name, begin, begin + high - low).reshape(high - low, *link.shape[1:]))
        row += run.length
    if not found:
        return read(link.parts[0].name, 0, 0).reshape(0, *link.shape[1:])
    rows = found[0] if len(found) == 1 else torch.cat(found)
    return rows if where is None else rows[(slice(None), *where[1:])]


def to_theirs(link: Link, ours: torch.Tensor) -> list[torch.Tensor]:
    """Hugging Face's tensors, in the order of `link.parts`; rows of padding behind ours are cut off."""
    if len(link.runs) == 1:
        return [ours[: link.shape[0]].reshape(link.parts[0].shape).contiguous()]
    theirs = [ours.new_empty(part.shape[0], *link.shape[1:]) for part in link.parts]
    row = 0
    for run in link.runs:
        theirs[run.part][run.start : run.start + run.length] = ours[row : row + run.length]
        row += run.length
    return [tensor.reshape(part.shape) for tensor, part in zip(theirs, link.parts, strict=True)]
