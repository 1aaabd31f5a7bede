"""Triton kernel of rotary positions: one program turns some heads of one row, and reads that row of the tables once for them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from megavlm_kernels.testing.ahead_of_time import Variant


@triton.jit
def _turn_kernel(
    x,
    cos,
    sin,
    out,
    num_heads,
    head_width,
    width,
    row_stride,
    head_stride,
    cos_stride,
    sin_stride,
    TRANSPOSED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    half = width // 2
    column = tl.arange(0, HALF)
    used = column < half
    cos_low = tl.load(cos + row * cos_stride + column, mask=used, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + row * cos_stride + half + column, mask=used, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + row * sin_stride + column, mask=used, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + row * sin_stride + half + column, mask=used, other=0.0).to(tl.float32)[None, :]
    inside = (head < num_heads)[:, None] & used[None, :]
    source = x + row * row_stride + head[:, None] * head_stride
    target = out + (row * num_heads + head[:, None]) * head_width
    low = tl.load(source + column[None, :], mask=inside, other=0.0).to(tl.float32)
    high = tl.load(source + half + column[None, :], mask=inside, other=0.0).to(tl.float32)
    if TRANSPOSED:
        turned_low = low * cos_low + high * sin_high
        turned_high = high * cos_high - low * sin_low
    else:
        turned_low = low * cos_low - high * sin_low
        turned_high = high * cos_high + low * sin_high
    tl.store(target + column[None, :], turned_low.to(out.dtype.element_ty), mask=inside)
    tl.store(target + half + column[None, :], turned_high.to(out.dtype.element_ty), mask=inside)
    if REST > 0:
        beyond = width + tl.arange(0, REST)
        kept = (head < num_heads)[:, None] & (beyond < head_width)[None, :]
        tl.store(target + beyond[None, :], tl.load(source + beyond[None, :], mask=kept, other=0.0), mask=kept)


def block_shape(num_heads: int, head_width: int, width: int) -> tuple[int, int, int]:
    """(heads of a program, pairs of a head, elements of a head that stay as they are), each a power of two or 0: at most 2048 pairs."""
    half = triton.next_power_of_2(width // 2)
    rest = triton.next_power_of_2(head_width - width) if width < head_width else 0
    return min(triton.next_power_of_2(num_heads), max(1, 2048 // max(half, rest))), half, rest


def turn(x_LHK: torch.Tensor, cos_LW: torch.Tensor, sin_LW: torch.Tensor, transposed: bool) -> torch.Tensor:
    """The rotation of (L, H, K), or its transpose."""
    x_LHK, cos_LW, sin_LW = (t if t.stride(-1) == 1 else t.contiguous() for t in (x_LHK, cos_LW, sin_LW))
    num_rows, num_heads, head_width = x_LHK.shape
    width = cos_LW.shape[1]
    out = torch.empty(x_LHK.shape, dtype=x_LHK.dtype, device=x_LHK.device)
    if out.numel():
        heads, half, rest = block_shape(num_heads, head_width, width)
        sizes = (num_heads, head_width, width, x_LHK.stride(0), x_LHK.stride(1), cos_LW.stride(0), sin_LW.stride(0))
        grid = (num_rows, triton.cdiv(num_heads, heads))
        _turn_kernel[grid](x_LHK, cos_LW, sin_LW, out, *sizes, transposed, heads, half, rest, num_warps=4)
    return out


def variants() -> Iterator[Variant]:
    """Usual heads, whole and partly rotated, both ways; every pair of formats at one of them."""
    numbers = ("num_heads", "head_width", "width", "row_stride", "head_stride", "cos_stride", "sin_stride")
    shapes = [(32, 128, 128), (8, 64, 64), (16, 80, 80), (32, 96, 48), (1, 256, 256), (128, 128, 64)]
    cases = [("bf16", "fp32", shape) for shape in shapes]
    cases += [(kind, table, (32, 128, 128)) for kind, table in (("fp32", "fp32"), ("bf16", "bf16"), ("fp16", "fp32"), ("fp16", "fp16"))]
    for kind, table, shape in cases:
        heads, half, rest = block_shape(*shape)
        signature = {"x": f"*{kind}", "cos": f"*{table}", "sin": f"*{table}", "out": f"*{kind}", **dict.fromkeys(numbers, "i32")}
        for transposed in (False, True):
            constants = {"TRANSPOSED": transposed, "HEADS": heads, "HALF": half, "REST": rest}
            yield Variant(_turn_kernel, signature, constants, {"num_warps": 4})
