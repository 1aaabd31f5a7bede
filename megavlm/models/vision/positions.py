"""Where a patch lies in its picture, as a vector that is added to it. One function a kind of `model.vision.positions`.

Shape legend: P patches of a picture, D width.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F


def interpolated_positions(table_PD: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Learned positions of a square of patches, stretched bicubically to rows x columns: (rows x columns, D), row by row.

    The numbers of Hugging Face's `interpolate_pos_encoding` (transformers 5.23, models/clip and models/siglip), which is torch's
    bicubic `interpolate` without antialiasing; the trained size itself is untouched, bit for bit. Written as two matrix products,
    because the gradient of `interpolate` adds up in no fixed order on a GPU.
    """
    side = int(table_PD.shape[0] ** 0.5)
    if (rows, columns) == (side, side):
        return table_PD
    square = table_PD.float().view(side, side, -1)
    down, across = (_weights(side, n).to(table_PD.device) for n in (rows, columns))
    tall = (down @ square.flatten(1)).view(rows, side, -1)
    return (across @ tall).flatten(0, 1).to(table_PD.dtype)


@lru_cache(maxsize=4096)
def _weights(size: int, wanted: int) -> torch.Tensor:
    """(wanted, size): how much of each of `size` points in a row goes into each of `wanted`."""
    with torch.no_grad():
        # Every row of the identity is a picture of one line with a single point set.
        points = torch.eye(size).view(size, 1, 1, size).expand(-1, -1, 4, -1)
        return F.interpolate(points, size=(4, wanted), mode="bicubic", align_corners=False)[:, 0, 0].T.contiguous()
