"""What an encoder hands to the projector.

Shape legend: N features of all pictures end to end, D width of a feature; behind the projector R rows of this rank, H LLM width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megavlm.models.vision.pictures import Grid

Collect = Callable[[torch.Tensor], torch.Tensor]
"""Rows of this rank's pictures (R, H) -> rows of all pictures in order (N, H), where pictures are dealt to ranks."""


def all_here(x_RH: torch.Tensor) -> torch.Tensor:
    """The `Collect` of a rank that has all pictures."""
    return x_RH


@dataclass
class Features:
    """Features of all pictures of a microbatch (tiles count as pictures), picture after picture, row by row."""

    x_ND: torch.Tensor
    grids: list[Grid]
    """(rows, columns) of patches of each picture."""
    lengths: list[int]
    """Features of each picture: rows x columns, one more with a class token, one where they are pooled."""
    deep: list[torch.Tensor] = field(default_factory=list)
    """Features (N, D) from the middle of the encoder for the LLM's first layers (DeepStack)."""

    instructions: tuple[torch.Tensor, list[int]] | None = None
    """Token ids of the text that goes with each picture, end to end, and how many there are of each (InstructBLIP)."""

    @property
    def equal_grid(self) -> Grid | None:
        """The grid of every picture when all are equal and nothing but patches is there."""
        if len(set(self.grids)) == 1 and set(self.lengths) == {self.grids[0][0] * self.grids[0][1]}:
            return self.grids[0]
        return None
