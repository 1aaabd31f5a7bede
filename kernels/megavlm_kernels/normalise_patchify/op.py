"""uint8 pixels -> normalised patches: a quarter of the bytes of fp32 to the device, and no tensor between pixels and patches there.

Pixels need no gradient. All ways give the same bits: a difference and a product in fp32, rounded once to the encoder's format.

Shape legend: T tiles, C channels, X pixels of all pictures, N patches, E = C x frames x patch x patch elements of a patch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megavlm_kernels.backend import uses_triton
from megavlm_kernels.blocks import BLOCK_ELEMENTS, row_blocks
from megavlm_kernels.normalise_patchify.reference import patches_reference


def patches_of_tiles(
    tiles_TCHW: torch.Tensor,
    mean_C: torch.Tensor,
    inverse_std_C: torch.Tensor,
    patch_px: int,
    dtype: torch.dtype,
    *,
    frames: int = 1,
    channels_last: bool = False,
) -> torch.Tensor:
    """(T, C, H, W) -> (N, E) in `dtype`: tile after tile, patches row by row.

    `mean_C` and `inverse_std_C` are fp32, in units of the pixels (0 to 255). Order of a patch's elements: `reference.py`. A picture fills
    `frames` frames with itself (a still seen by an encoder of videos). Pixels beyond the last whole patch are left out, as a convolution
    without padding leaves them (SigLIP's 384 pixels in patches of 14).
    """
    count, channels, height, width = tiles_TCHW.shape
    if uses_triton(tiles_TCHW):
        from megavlm_kernels.normalise_patchify.triton import patches_at, starts_in_tiles

        starts = starts_in_tiles(count, channels, height, width, patch_px, tiles_TCHW.device)
        return patches_at(tiles_TCHW.reshape(-1), starts, mean_C, inverse_std_C, patch_px, dtype, frames, channels_last)
    patches_of = _in_torch(mean_C, inverse_std_C, patch_px, dtype, frames, channels_last)
    if tiles_TCHW.numel() <= BLOCK_ELEMENTS:
        return patches_of(tiles_TCHW)
    out_NE = _room(tiles_TCHW, count * (height // patch_px) * (width // patch_px), channels * frames * patch_px**2, dtype)
    _fill(out_NE, tiles_TCHW, patch_px, patches_of)
    return out_NE


def patches_of_pictures(
    pixels_X: torch.Tensor,
    grids: Sequence[tuple[int, int]],
    mean_C: torch.Tensor,
    inverse_std_C: torch.Tensor,
    patch_px: int,
    dtype: torch.dtype,
    *,
    frames: int = 1,
    channels_last: bool = False,
) -> torch.Tensor:
    """Pictures in their own size, end to end, each (C, height, width), with (rows, columns) of patches of each -> (N, E) in `dtype`.

    Picture after picture; otherwise as `patches_of_tiles`.

    Raises ValueError when there are not as many pixels as the grids say.
    """
    channels, area = mean_C.shape[0], patch_px**2
    counts = [rows * columns for rows, columns in grids]
    if channels * area * sum(counts) != pixels_X.numel():
        raise ValueError(f"{pixels_X.numel()} pixel values are not {sum(counts)} patches of {channels} x {patch_px} x {patch_px}")
    if uses_triton(pixels_X):
        from megavlm_kernels.normalise_patchify.triton import patches_at, starts_in_pictures

        starts = starts_in_pictures(grids, channels, patch_px, pixels_X.device)
        return patches_at(pixels_X, starts, mean_C, inverse_std_C, patch_px, dtype, frames, channels_last)
    patches_of = _in_torch(mean_C, inverse_std_C, patch_px, dtype, frames, channels_last)
    out_NE = _room(pixels_X, sum(counts), channels * frames * area, dtype)
    runs = pixels_X.split([channels * area * count for count in counts])
    for (rows, columns), run, part in zip(grids, runs, out_NE.split(counts), strict=True):
        picture = run.view(1, channels, rows * patch_px, columns * patch_px)
        _fill(part, picture, patch_px, patches_of)
    return out_NE


def _in_torch(
    mean_C: torch.Tensor, inverse_std_C: torch.Tensor, patch_px: int, dtype: torch.dtype, frames: int, channels_last: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """(T, C, H, W) -> (N, E)."""
    return lambda tiles_TCHW: patches_reference(
        tiles_TCHW, mean_C, inverse_std_C, patch_px, dtype, frames=frames, channels_last=channels_last
    )


def _room(like: torch.Tensor, num_patches: int, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(num_patches, num_elements, dtype=dtype, device=like.device)


def _fill(out_NE: torch.Tensor, tiles_TCHW: torch.Tensor, patch_px: int, patches_of: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """`patches_of` (T, C, H, W) -> (N, E) in plain torch, of as many tiles, or rows of patches, at a time as stay in the cache."""
    count, channels, height, width = tiles_TCHW.shape
    down, across = height // patch_px, width // patch_px
    if out_NE.numel() == 0:
        return
    for tiles in row_blocks(count, channels * height * width):
        target = out_NE[tiles.start * down * across : tiles.stop * down * across]
        if tiles.stop - tiles.start > 1:
            target.copy_(patches_of(tiles_TCHW[tiles]))
            continue
        for rows in row_blocks(down, channels * patch_px * width):
            band = tiles_TCHW[tiles, :, rows.start * patch_px : rows.stop * patch_px]
            target[rows.start * across : rows.stop * across].copy_(patches_of(band))
