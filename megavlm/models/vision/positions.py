"""Where a patch lies in its picture, as a vector that is added to it. One function a kind of `model.vision.positions`.

Shape legend: P patches of a picture, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F


def interpolated_positions(table_PD: torch.Tensor, rows: int, columns: int, method: str = "bicubic") -> torch.Tensor:
    """Learned positions of a square of patches, stretched to rows x columns: (rows x columns, D), row by row.

    `method` is model.vision.position_interpolation. The numbers of Hugging Face's `interpolate_pos_encoding` (transformers 5.23,
    models/clip, siglip, dinov2, dinov2_with_registers, siglip2), which is torch's `interpolate`; the trained size itself is untouched,
    bit for bit. Written as two matrix products,
    because the gradient of `interpolate` adds up in no fixed order on a GPU.
    """
    side = int(table_PD.shape[0] ** 0.5)
    if (rows, columns) == (side, side):
        return table_PD
    square = table_PD.float().view(side, side, -1)
    down, across = (_weights(side, n, method).to(table_PD.device) for n in (rows, columns))
    tall = (down @ square.flatten(1)).view(rows, side, -1)
    return (across @ tall).flatten(0, 1).to(table_PD.dtype)


def bucketed_positions(table_PD: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Learned positions of a square of patches, each patch taking the one that lies where it lies as a fraction of its picture.

    The numbers of transformers 5.23, models/idefics2 `Idefics2VisionEmbeddings` (idefics3 and smolvlm have the same).
    """
    side = int(table_PD.shape[0] ** 0.5)
    down, across = (_buckets(side, n).to(table_PD.device) for n in (rows, columns))
    # Indexed, not index_select: its gradient adds up in a fixed order on a GPU.
    return table_PD[(down[:, None] * side + across).flatten()]


def factorised_positions(table_PD: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The sum of a vector of the patch's row and one of its column (NaViT, https://arxiv.org/abs/2307.06304, section 2.2).

    The table holds the vectors of rows, then those of columns. Raises ValueError for a picture with more of either.
    """
    side = table_PD.shape[0] // 2
    if max(rows, columns) > side:
        raise ValueError(
            f"a picture of {rows} x {columns} patches, but model.vision.positions=factorised knows {side} rows and columns: "
            "raise model.vision.image_size_px before training, or lower data.image.max_tokens_per_image"
        )
    down, across = table_PD[:rows], table_PD[side : side + columns]
    return (down[:, None] + across[None]).flatten(0, 1)


POSITIONS: dict[str, Callable[[torch.Tensor, int, int], torch.Tensor]] = {
    "learned": interpolated_positions,
    "learned_rotary": interpolated_positions,
    "bucketed": bucketed_positions,
    "factorised": factorised_positions,
}


@lru_cache(maxsize=4096)
def _buckets(side: int, wanted: int) -> torch.Tensor:
    """int64 (wanted,): which of `side` equal parts of a line each of `wanted` equal steps begins in.

    In fp32 and by the formula of the source to the letter: a step that begins at a bound falls to one side by rounding.
    """
    bounds = torch.arange(1 / side, 1.0, 1 / side)
    begins = torch.arange(wanted, dtype=torch.float32) * (1.0 / torch.tensor(wanted))
    return torch.bucketize(begins.clamp(max=1.0 - 1e-6), bounds, right=True)


@lru_cache(maxsize=4096)
def _weights(size: int, wanted: int, method: str) -> torch.Tensor:
    """(wanted, size): how much of each of `size` points in a row goes into each of `wanted`."""
    with torch.no_grad():
        # Every row of the identity is a picture of one line with a single point set.
        points = torch.eye(size).view(size, 1, 1, size).expand(-1, -1, 4, -1)
        mode, detail = method.split("_")[0], method.partition("_")[2]
        stretched = F.interpolate(points, size=(4, wanted), mode=mode, align_corners=detail == "corners", antialias=detail == "antialiased")
        return stretched[:, 0, 0].T.contiguous()
