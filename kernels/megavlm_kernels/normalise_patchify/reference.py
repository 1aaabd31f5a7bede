"""What the op computes, step by step in plain torch: every other way gives the same bits."""

from __future__ import annotations

import torch


def patches_reference(
    tiles_TCHW: torch.Tensor,
    mean_C: torch.Tensor,
    inverse_std_C: torch.Tensor,
    patch_px: int,
    dtype: torch.dtype,
    *,
    frames: int = 1,
    channels_last: bool = False,
) -> torch.Tensor:
    """(pixel - mean) x inverse std in fp32, cut into patches row by row: (T x patches of a tile, C x frames x patch x patch).

    Elements of a patch are ordered channel, frame, row, column; with `channels_last` row, frame, column, channel. A picture is its own next
    frame.
    """
    pixels = (tiles_TCHW.float() - mean_C[:, None, None]) * inverse_std_C[:, None, None]
    patches = pixels.unfold(2, patch_px, patch_px).unfold(3, patch_px, patch_px)  # T, C, rows, columns, patch, patch
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # N, C, patch, patch
    if channels_last:
        patches = patches.permute(0, 2, 3, 1)
    if frames > 1:
        patches = patches.unsqueeze(2).expand(-1, -1, frames, -1, -1)
    return patches.flatten(1).to(dtype)
