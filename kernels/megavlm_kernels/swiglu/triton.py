"""Triton kernels of gated linear units: one program has a part of one row of gate and of up."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from megavlm_kernels.swiglu.reference import ACTIVATIONS
from megavlm_kernels.testing.ahead_of_time import Variant

BLOCK, WARPS = 1024, 4


@triton.jit
def _activated(gate, ACTIVATION: tl.constexpr):
    """(activation, its derivative) of fp32 gates; what a caller does not use costs nothing."""
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid * (1.0 + gate * (1.0 - sigmoid))
    elif ACTIVATION == "quick_gelu":
        sigmoid = tl.sigmoid(1.702 * gate)
        value = gate * sigmoid
        slope = sigmoid * (1.0 + 1.702 * gate * (1.0 - sigmoid))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1.0 + tl.math.erf(gate * 0.7071067811865476))
        value = gate * below
        slope = below + gate * tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    elif ACTIVATION == "gelu_tanh":
        # tanh(z) = 2 sigmoid(2z) - 1, hence 0.5 (1 + tanh(z)) = sigmoid(2z); z = sqrt(2 / pi) (gate + 0.044715 gate^3).
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        value = gate * share
        slope = share + gate * share * (1.0 - share) * (1.5957691216057308 + 0.21406444881780076 * gate * gate)
    else:
        tl.static_assert(ACTIVATION == "relu")
        value = tl.maximum(gate, 0.0)
        slope = tl.where(gate > 0.0, 1.0, 0.0)
    return value, slope


@triton.jit
def _forward_kernel(gate_up, out, width, stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    value, _slope = _activated(gate, ACTIVATION)
    tl.store(out + row * width + column, (value * up).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(grad, gate_up, grad_gate_up, width, grad_stride, stride, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * stride + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * stride + width + column, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * grad_stride + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = _activated(gate, ACTIVATION)
    start = grad_gate_up + row * 2 * width + column
    tl.store(start, (upstream * up * slope).to(grad_gate_up.dtype.element_ty), mask=inside)
    tl.store(start + width, (upstream * value).to(grad_gate_up.dtype.element_ty), mask=inside)


def forward(gate_up_R2F: torch.Tensor, activation: str) -> torch.Tensor:
    """(R, F)."""
    gate_up_R2F = _rows(gate_up_R2F)
    num_rows, width = gate_up_R2F.shape[0], gate_up_R2F.shape[1] // 2
    out_RF = torch.empty((num_rows, width), dtype=gate_up_R2F.dtype, device=gate_up_R2F.device)
    if out_RF.numel():
        grid = (num_rows, triton.cdiv(width, BLOCK))
        _forward_kernel[grid](gate_up_R2F, out_RF, width, gate_up_R2F.stride(0), activation, BLOCK, num_warps=WARPS)
    return out_RF


def backward(grad_RF: torch.Tensor, gate_up_R2F: torch.Tensor, activation: str) -> torch.Tensor:
    """Gradient of gate and up, (R, 2F)."""
    grad_RF, gate_up_R2F = _rows(grad_RF), _rows(gate_up_R2F)
    num_rows, width = grad_RF.shape
    out_R2F = torch.empty((num_rows, 2 * width), dtype=gate_up_R2F.dtype, device=gate_up_R2F.device)
    if out_R2F.numel():
        grid, strides = (num_rows, triton.cdiv(width, BLOCK)), (grad_RF.stride(0), gate_up_R2F.stride(0))
        _backward_kernel[grid](grad_RF, gate_up_R2F, out_R2F, width, *strides, activation, BLOCK, num_warps=WARPS)
    return out_R2F


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Rows may lie apart, their elements may not."""
    return x if x.stride(1) == 1 else x.contiguous()


def variants() -> Iterator[Variant]:
    """Every activation in bf16; every other format with silu."""
    for activation, kind in [(name, "bf16") for name in ACTIVATIONS] + [("silu", "fp32"), ("silu", "fp16")]:
        constants, options = {"ACTIVATION": activation, "BLOCK": BLOCK}, {"num_warps": WARPS}
        signature = {"gate_up": f"*{kind}", "out": f"*{kind}", "width": "i32", "stride": "i32"}
        yield Variant(_forward_kernel, signature, constants, options)
        signature = {
            "grad": f"*{kind}",
            "gate_up": f"*{kind}",
            "grad_gate_up": f"*{kind}",
            "width": "i32",
            "grad_stride": "i32",
            "stride": "i32",
        }
        yield Variant(_backward_kernel, signature, constants, options)
