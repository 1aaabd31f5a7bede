"""Triton kernels of replaced rows: one program copies (a part of) one row, from wherever it comes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from megavlm_kernels.testing.ahead_of_time import Variant

BLOCK, WARPS = 1024, 4


@triton.jit
def _forward_kernel(x, features, source, out, width, x_stride, features_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    feature = tl.load(source + row).to(tl.int64)
    # Of the two loads one is masked out whole, and reads nothing.
    own = tl.load(x + row * x_stride + column, mask=inside & (feature < 0), other=0.0)
    other = tl.load(features + feature * features_stride + column, mask=inside & (feature >= 0), other=0.0)
    tl.store(out + row * width + column, tl.where(feature < 0, own, other.to(out.dtype.element_ty)), mask=inside)


@triton.jit
def _backward_kernel(grad, source, grad_x, grad_features, width, stride, WANTS_FEATURES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    feature = tl.load(source + row).to(tl.int64)
    upstream = tl.load(grad + row * stride + column, mask=inside, other=0.0)
    tl.store(grad_x + row * width + column, tl.where(feature < 0, upstream, 0.0), mask=inside)
    if WANTS_FEATURES:
        target = grad_features + feature * width + column
        tl.store(target, upstream.to(grad_features.dtype.element_ty), mask=inside & (feature >= 0))


def source_rows(num_rows: int, positions_N: torch.Tensor) -> torch.Tensor:
    """int32 (S,): which feature replaces each row; -1 none. torch's indexing asserts on the device that positions are inside."""
    source_S = torch.full((num_rows,), -1, dtype=torch.int32, device=positions_N.device)
    return source_S.index_copy_(0, positions_N, torch.arange(positions_N.shape[0], dtype=torch.int32, device=positions_N.device))


def forward(x_SD: torch.Tensor, features_ND: torch.Tensor, source_S: torch.Tensor) -> torch.Tensor:
    """(S, D) in x's format."""
    x_SD, features_ND = _rows(x_SD), _rows(features_ND)
    num_rows, width = x_SD.shape
    out_SD = torch.empty((num_rows, width), dtype=x_SD.dtype, device=x_SD.device)
    if out_SD.numel():
        sizes = (width, x_SD.stride(0), features_ND.stride(0))
        _forward_kernel[_grid(num_rows, width)](x_SD, features_ND, source_S, out_SD, *sizes, BLOCK, num_warps=WARPS)
    return out_SD


def backward(
    grad_SD: torch.Tensor, source_S: torch.Tensor, num_features: int, features_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (S, D) and of the features (N, D); with `num_features` 0 that one is not computed."""
    grad_SD = _rows(grad_SD)
    num_rows, width = grad_SD.shape
    grad_x = torch.empty((num_rows, width), dtype=grad_SD.dtype, device=grad_SD.device)
    grad_features = torch.empty((num_features, width), dtype=features_dtype, device=grad_SD.device)
    if grad_x.numel():
        sizes = (width, grad_SD.stride(0))
        _backward_kernel[_grid(num_rows, width)](grad_SD, source_S, grad_x, grad_features, *sizes, num_features > 0, BLOCK, num_warps=WARPS)
    return grad_x, grad_features


def _grid(num_rows: int, width: int) -> tuple[int, int]:
    return num_rows, triton.cdiv(width, BLOCK)


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Rows may lie apart, their elements may not."""
    return x if x.stride(1) == 1 else x.contiguous()


def variants() -> Iterator[Variant]:
    """Every format, and features in fp32 among rows in bf16, as a projector that stays in fp32 gives them."""
    options, sizes = {"num_warps": WARPS}, {"width": "i32", "x_stride": "i32", "features_stride": "i32"}
    for kind, features in [("bf16", "bf16"), ("fp16", "fp16"), ("fp32", "fp32"), ("bf16", "fp32")]:
        signature = {"x": f"*{kind}", "features": f"*{features}", "source": "*i32", "out": f"*{kind}", **sizes}
        yield Variant(_forward_kernel, signature, {"BLOCK": BLOCK}, options)
        signature = {"grad": f"*{kind}", "source": "*i32", "grad_x": f"*{kind}", "grad_features": f"*{features}", "width": "i32"}
        for wants in (True, False):
            yield Variant(_backward_kernel, signature | {"stride": "i32"}, {"WANTS_FEATURES": wants, "BLOCK": BLOCK}, options)
