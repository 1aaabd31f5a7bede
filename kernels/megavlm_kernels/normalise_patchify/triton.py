"""Triton kernel of normalised patches: one program writes (a part of) one patch, from where its pixels start in the run of all pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl

from megavlm_kernels.testing.ahead_of_time import Variant
from megavlm_kernels.transfer import to_device

MAX_BLOCK, WARPS = 1024, 4


@triton.jit
def _patch_kernel(
    pixels,
    start,
    row_stride,
    channel_stride,
    mean,
    inverse_std,
    out,
    CHANNELS: tl.constexpr,
    FRAMES: tl.constexpr,
    PATCH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    patch = tl.program_id(0)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = element < CHANNELS * FRAMES * PATCH * PATCH
    if CHANNELS_LAST:
        channel = element % CHANNELS
        column = element // CHANNELS % PATCH
        row = element // (CHANNELS * PATCH * FRAMES)
    else:
        channel = element // (FRAMES * PATCH * PATCH)
        column = element % PATCH
        row = element // PATCH % PATCH
    source = tl.load(start + patch) + channel * tl.load(channel_stride + patch) + row * tl.load(row_stride + patch) + column
    value = tl.load(pixels + source, mask=inside, other=0).to(tl.float32)
    shift = tl.load(mean + channel, mask=inside, other=0.0)
    scale = tl.load(inverse_std + channel, mask=inside, other=0.0)
    target = out + patch.to(tl.int64) * (CHANNELS * FRAMES * PATCH * PATCH) + element
    tl.store(target, ((value - shift) * scale).to(out.dtype.element_ty), mask=inside)


Starts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""For each patch: its first pixel (int64), pixels from one row to the next, and from one channel to the next."""


def starts_in_tiles(count: int, channels: int, height: int, width: int, patch_px: int, device: torch.device) -> Starts:
    """Of equal tiles, by arithmetic on the device."""
    down, across = height // patch_px, width // patch_px
    patch_N = torch.arange(count * down * across, device=device)
    tile_N, place_N = patch_N // max(1, down * across), patch_N % max(1, down * across)
    start_N = tile_N * (channels * height * width) + place_N // max(1, across) * (patch_px * width) + place_N % max(1, across) * patch_px
    return start_N, torch.full_like(patch_N, width), torch.full_like(patch_N, height * width)


def starts_in_pictures(grids: Sequence[tuple[int, int]], channels: int, patch_px: int, device: torch.device) -> Starts:
    """Of pictures of unequal sizes: one small table goes to the device, and nothing waits for it there."""
    rows, first_pixel, first_patch = [], 0, 0
    for down, across in grids:
        rows.append((first_pixel, first_patch, across, down * across))
        first_pixel += channels * down * across * patch_px**2
        first_patch += down * across
    table = to_device(torch.tensor(rows, dtype=torch.int64).view(-1, 4), device)
    picture_N = torch.repeat_interleave(torch.arange(len(rows), device=device), table[:, 3], output_size=first_patch)
    pixel_N, patch_N, across_N, count_N = table[picture_N].unbind(1)
    place_N = torch.arange(first_patch, device=device) - patch_N
    width_N = across_N * patch_px
    start_N = pixel_N + place_N // across_N * (patch_px * width_N) + place_N % across_N * patch_px
    return start_N, width_N, count_N * patch_px**2


def patches_at(
    pixels_X: torch.Tensor,
    starts: Starts,
    mean_C: torch.Tensor,
    inverse_std_C: torch.Tensor,
    patch_px: int,
    dtype: torch.dtype,
    frames: int,
    channels_last: bool,
) -> torch.Tensor:
    """(N, E)."""
    channels, num_patches = mean_C.shape[0], starts[0].shape[0]
    width = channels * frames * patch_px**2
    out_NE = torch.empty(num_patches, width, dtype=dtype, device=pixels_X.device)
    if num_patches:
        block = _block(width)
        constants = (channels, frames, patch_px, channels_last, block)
        grid = (num_patches, triton.cdiv(width, block))
        tensors = (mean_C.contiguous(), inverse_std_C.contiguous(), out_NE)
        _patch_kernel[grid](pixels_X.contiguous(), *starts, *tensors, *constants, num_warps=WARPS)
    return out_NE


def _block(width: int) -> int:
    return min(MAX_BLOCK, triton.next_power_of_2(width))


def variants() -> Iterator[Variant]:
    """Encoders' usual patches in bf16, both orders; other formats once."""
    cases = [("bf16", 14, 1, False), ("bf16", 16, 1, False), ("bf16", 16, 1, True), ("bf16", 14, 2, False)]
    cases += [("fp32", 14, 1, False), ("fp16", 14, 1, False)]
    for kind, patch, frames, channels_last in cases:
        signature = {"pixels": "*u8", "start": "*i64", "row_stride": "*i64", "channel_stride": "*i64", "out": f"*{kind}"}
        signature |= {"mean": "*fp32", "inverse_std": "*fp32"}
        constants = {
            "CHANNELS": 3,
            "FRAMES": frames,
            "PATCH": patch,
            "CHANNELS_LAST": channels_last,
            "BLOCK": _block(3 * frames * patch**2),
        }
        yield Variant(_patch_kernel, signature, constants, {"num_warps": WARPS})
