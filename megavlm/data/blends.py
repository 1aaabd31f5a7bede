"""Visual tokens that mix several rows of the projector's output, each with a weight (LLaVA-OneVision's shrunk pictures).

A row and its weight are one int64: the row below, the weight in fixed point above. So whoever joins pictures adds the rows that stand
before a picture's own, and need not know whether tokens take one row, (N,), or mix four, (N, 4). -1 is the learned end of a row.

Shape legend: N visual tokens.
"""

from __future__ import annotations

import numpy as np
import torch

ROW_BITS, WEIGHT_BITS = 40, 22
_ROW_MASK, ONE = (1 << ROW_BITS) - 1, 1 << WEIGHT_BITS


def shrunk(rows: np.ndarray, lines: int, columns: int) -> np.ndarray:
    """A picture of rows (height, width), shrunk bilinearly: int64 (lines, columns, 4).

    The weights are those of torch's `interpolate`, mode="bilinear", without antialiasing and with align_corners=False.
    """
    (above, below, down), (before, behind, across) = _neighbours(rows.shape[0], lines), _neighbours(rows.shape[1], columns)
    corners = np.stack([rows[y][:, x] for y in (above, below) for x in (before, behind)], axis=-1)
    weights = np.stack([y[:, None] * x[None] for y in (1 - down, down) for x in (1 - across, across)], axis=-1)
    fixed = np.rint(weights * ONE).astype(np.int64)
    fixed[..., 0] += ONE - fixed.sum(-1)  # rounded, they still add up to one
    return corners + (fixed << ROW_BITS)


def single(rows: np.ndarray) -> np.ndarray:
    """Rows that tokens take whole, in the form of `shrunk`: (..., 4)."""
    own = np.where(rows < 0, rows, rows + (ONE << ROW_BITS))
    return np.concatenate([own[..., None], np.zeros((*rows.shape, 3), dtype=np.int64)], axis=-1)


def _neighbours(size: int, wanted: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each of `wanted` points on a line of `size`: the two nearest, and the share of the second."""
    place = np.maximum((np.arange(wanted) + 0.5) * (size / wanted) - 0.5, 0.0)
    first = place.astype(np.int64)
    return first, np.minimum(first + 1, size - 1), place - first


def rows_and_weights(rows_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rows (N,) or (N, 4), and of the latter the weights in fp32."""
    if rows_N.dim() == 1:
        return rows_N, None
    rows = torch.where(rows_N < 0, rows_N, rows_N & _ROW_MASK)
    return rows, torch.where(rows_N < 0, ONE, rows_N >> ROW_BITS).float() / ONE
