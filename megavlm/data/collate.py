"""Samples laid end to end: the arrays of single samples become one PackedBatch.

Shape legend: L tokens of a sample, N visual tokens, Q targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.data.prompt import instruction_fields
from megavlm.data.resizing import PictureGrid
from megavlm.data.types import PackedBatch, PictureTiles, SampleRef


@dataclass
class Piece:
    """One sample as arrays."""

    ref: SampleRef
    key: str
    task: str
    ids_L: np.ndarray
    target_rows_Q: np.ndarray
    """Rows (from 0) whose hidden state predicts target_ids_Q."""
    target_ids_Q: np.ndarray
    weight: float
    """Loss weight of each target."""
    image_rows_N: np.ndarray
    """Rows (from 0) that visual features replace."""
    grids: list[PictureGrid]
    feature_rows: list[np.ndarray | None]
    """Of each picture: see Resizing.feature_rows."""
    pixels: list[torch.Tensor]
    """Of each picture, as the policy cuts it; empty on a rank without an encoder."""
    instructions: list[list[int]]
    """Of each picture: see data/instructions.py; empty where the projector reads no text, or without an encoder."""
    problem: str | None
    """Why a picture of this sample could not be read."""


def collate(pieces: Sequence[Piece | int], pad_id: int, tokens_per_tile: int, native: bool) -> PackedBatch:
    """One batch of `pieces` in order; an int is so many rows of padding.

    Args:
        tokens_per_tile: rows that the projector makes of one tile; unused with `native`.
        native: pictures are flat runs of pixels (PackedBatch.pixels_X), not tiles.
    """
    samples = [p for p in pieces if isinstance(p, Piece)]
    lengths = [len(p.ids_L) if isinstance(p, Piece) else p for p in pieces]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    at = [(int(starts[i]), i, p) for i, p in enumerate(pieces) if isinstance(p, Piece)]
    pixels = [picture for p in samples for picture in p.pixels]
    joined = torch.cat(pixels) if pixels else None
    bad = [{"source": p.ref.source, "key": p.key, "row": p.ref.row, "reason": p.problem} for p in samples if p.problem is not None]
    rows = None if native else _feature_rows(samples, tokens_per_tile)
    return PackedBatch(
        tokens_S=_tensor([p.ids_L if isinstance(p, Piece) else np.full(p, pad_id) for p in pieces]),
        positions_S=_tensor([np.arange(n) for n in lengths]),
        segment_lengths=lengths,
        segment_samples=[p.ref if isinstance(p, Piece) else None for p in pieces],
        segment_tasks=[p.task if isinstance(p, Piece) else "" for p in pieces],
        target_positions_Q=_tensor([p.target_rows_Q + start for start, _, p in at]),
        target_ids_Q=_tensor([p.target_ids_Q for p in samples]),
        target_weights_Q=_tensor([np.full(len(p.target_ids_Q), p.weight, dtype=np.float32) for p in samples], torch.float32),
        target_segments_Q=_tensor([np.full(len(p.target_ids_Q), i) for _, i, p in at]),
        image_positions_N=_tensor([p.image_rows_N + start for start, _, p in at]),
        num_tiles=sum(g.work.tiles for p in samples for g in p.grids),
        tiles_TCHW=None if native else joined,
        pixels_X=joined if native else None,
        tile_grids=[(g.rows, g.cols) for p in samples for g in p.grids] if native else None,
        picture_tiles=None if native else [PictureTiles(g.work.tiles, g.rows, g.cols) for p in samples for g in p.grids],
        feature_rows_N=None if rows is None else _tensor(rows),
        **instruction_fields([own for p in samples for own in p.instructions]),
        num_bad_samples=len(bad),
        metadata={"bad_samples": bad, "num_samples": len(samples), "keys": [p.key for p in samples]},
    )


def _feature_rows(samples: Sequence[Piece], tokens_per_tile: int) -> list[np.ndarray] | None:
    """Rows of each picture in the microbatch's projector output, where every tile has `tokens_per_tile`; None: all in order."""
    if all(rows is None for p in samples for rows in p.feature_rows):
        return None
    found, start = [], 0
    for p in samples:
        for grid, rows in zip(p.grids, p.feature_rows, strict=True):
            made = grid.work.tiles * tokens_per_tile
            own = np.arange(made) if rows is None else rows
            found.append(np.where(own < 0, -1, own + start))
            start += made
    return found


def _tensor(arrays: Sequence[np.ndarray], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(dtype) if arrays else torch.zeros(0, dtype=dtype)
