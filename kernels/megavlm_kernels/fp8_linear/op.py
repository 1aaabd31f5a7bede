"""A linear layer in FP8 through `torch._scaled_mm`, on GPUs from compute capability 8.9 on and, bit by bit slower, on CPUs.

Output, gradient of the input and gradient of the weight are each one product of FP8 matrices: e4m3 x e4m3 forward, and e5m2 (gradients)
x e4m3 backward (Micikevicius et al. 2022, https://arxiv.org/abs/2209.05433, section 3). Scales are those of the tensors at hand
("current" scaling), one a tensor or one a row. Accumulation is in fp32, results are in the input's format.

Rows are filled up with zeros to a multiple of 16 inside, since the gradient of the weight sums over them and cuBLAS wants sums of a
multiple of 16; the filling is cut off again and changes no maximum, so a pack of any length gives what the same pack padded gives.

Across tensor ranks (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, section 4.2): with `gather` the rows of all ranks are
gathered before the product, and their gradients reduce-scattered; with `sum_gradient` every rank has all rows, and gradients are added
up. Of a gathered input each rank keeps its own rows only, in FP8, and gathers again in the backward pass: half the bytes of bf16.

Shape legend: M rows, L this rank's rows, K input width, N output width, P rows with padding.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from megavlm_kernels.fp8_cast import E4M3, E5M2, Fp8Matrix, fp8_cast

ALIGNMENT = 16
"""cuBLAS's FP8 products want every dimension to be a multiple of this."""
Group = dist.ProcessGroup


class Fp8Format(NamedTuple):
    """How numbers are rounded."""

    by_row: bool = False
    """A scale for each row (and column) instead of one for each tensor; on a GPU the input must be bf16 then."""
    hybrid: bool = True
    """Gradients in e5m2, which reaches further; else all in e4m3, which is finer."""

    @property
    def gradients(self) -> torch.dtype:
        return E5M2 if self.hybrid else E4M3


def whatever_stops_scaled_mm(device_type: str, capability: tuple[int, int] | None) -> str | None:
    """Why `torch._scaled_mm` cannot multiply FP8 there; None when it can. Capability: of a CUDA device."""
    if not hasattr(torch, "_scaled_mm"):
        return "this torch has no torch._scaled_mm: install torch 2.5 or newer"
    if device_type == "cuda" and (capability is None or capability < (8, 9)):
        has = "unknown" if capability is None else f"{capability[0]}.{capability[1]}"
        return f"FP8 needs a GPU of compute capability 8.9 (Ada, Hopper) or higher, this one has {has}"
    return None


def cast_weight(weight_NK: torch.Tensor, form: Fp8Format, *, transpose: bool) -> Fp8Matrix:
    """A weight for `fp8_linear`, to be used again while it does not change. `transpose`: also for gradients of inputs."""
    return fp8_cast(weight_NK, E4M3, by_row=form.by_row, transpose=transpose, multiple=1)


def fp8_linear(
    x: torch.Tensor,
    weight_NK: torch.Tensor,
    bias_N: torch.Tensor | None = None,
    *,
    form: Fp8Format = Fp8Format(),  # noqa: B008 - immutable
    cast: Fp8Matrix | None = None,
    gather: Group | None = None,
    sum_gradient: Group | None = None,
) -> torch.Tensor:
    """(L, ..., K) -> (M, ..., N): x times the transposed weight, plus bias. M is L, or with `gather` the rows of all its ranks.

    `cast` is `cast_weight(weight_NK)` of this very weight. Rows may be any number, also none.

    Raises:
        ValueError: K or N is no multiple of 16.
    """
    outputs, inputs = weight_NK.shape
    if outputs % ALIGNMENT or inputs % ALIGNMENT:
        raise ValueError(f"a weight of {outputs} x {inputs} cannot be multiplied in FP8: both must be multiples of {ALIGNMENT}")
    out: torch.Tensor = _Fp8Linear.apply(x, weight_NK, form, cast, gather, sum_gradient)  # type: ignore[no-untyped-call]
    return out if bias_N is None else out + bias_N


def scaled_matmul(
    a_RS: torch.Tensor, a_scale: torch.Tensor, b_CS: torch.Tensor, b_scale: torch.Tensor, out: torch.dtype, *, fast: bool = False
) -> torch.Tensor:
    """(R, C): rows of FP8 times rows of FP8. Sums are exact to fp32 but where `fast`: Hopper's quicker, shorter ones, good enough for a
    forward pass and not for a gradient."""
    if not a_RS.numel():
        return torch.zeros(a_RS.shape[0], b_CS.shape[0], dtype=out, device=a_RS.device)
    if a_scale.dim():
        b_scale = b_scale.view(1, -1)
    return torch._scaled_mm(a_RS, b_CS.t(), scale_a=a_scale, scale_b=b_scale, out_dtype=out, use_fast_accum=fast)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight_NK: torch.Tensor,
        form: Fp8Format,
        cast: Fp8Matrix | None,
        gather: Group | None,
        sum_gradient: Group | None,
    ) -> torch.Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        x_LK = x.reshape(-1, x.shape[-1])
        x_MK = x_LK if gather is None else _gathered(x_LK, gather)
        if cast is None or (wants_x and cast.data_CP is None):
            cast = cast_weight(weight_NK, form, transpose=wants_x)
        own = fp8_cast(x_MK, E4M3, by_row=form.by_row, transpose=wants_weight)
        out = scaled_matmul(own.data_PC, own.scale, cast.data_PC, cast.scale, x.dtype, fast=True)[: x_MK.shape[0]]
        kept = own.data_CP
        if kept is not None and gather is not None:
            start = dist.get_rank(gather) * x_LK.shape[0]
            kept = kept[:, start : start + x_LK.shape[0]].contiguous()
        ctx.save_for_backward(kept, own.scale_C, cast.data_CP if wants_x else None, cast.scale_C if wants_x else None)
        ctx.form, ctx.gather, ctx.sum_gradient, ctx.shape, ctx.dtypes = form, gather, sum_gradient, x.shape, (x.dtype, weight_NK.dtype)
        return out.reshape(x_MK.shape[0] if x.dim() == 2 else -1, *x.shape[1:-1], weight_NK.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None, None, None]:
        kept, kept_scale, weight_KN, weight_scale = ctx.saved_tensors
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        form, (x_dtype, weight_dtype) = ctx.form, ctx.dtypes
        grad_MN = grad.reshape(-1, grad.shape[-1])
        cast = fp8_cast(grad_MN, form.gradients, by_row=form.by_row, transpose=wants_weight)
        grad_x = grad_weight = work = None
        if wants_x:
            whole = scaled_matmul(cast.data_PC, cast.scale, weight_KN, weight_scale, x_dtype)[: grad_MN.shape[0]]
            grad_x, work = _reduced(whole, ctx.gather, ctx.sum_gradient)
        if wants_weight:
            assert cast.data_CP is not None and cast.scale_C is not None
            if ctx.gather is not None:
                kept = _gathered_columns(kept, cast.data_PC.shape[0], ctx.gather)
            grad_weight = scaled_matmul(cast.data_CP, cast.scale_C, kept, kept_scale, weight_dtype)
        if work is not None:
            work.wait()
        return None if grad_x is None else grad_x.reshape(ctx.shape), grad_weight, None, None, None, None


def _reduced(whole_MK: torch.Tensor, gather: Group | None, sum_gradient: Group | None) -> tuple[torch.Tensor, Any]:
    """This rank's part of the input's gradient, and what to wait for: the gradient of the weight is computed meanwhile."""
    if gather is not None:
        ranks = dist.get_world_size(gather)
        out = whole_MK.new_empty(whole_MK.shape[0] // ranks, whole_MK.shape[1])
        return out, dist.reduce_scatter_tensor(out, whole_MK.contiguous(), group=gather, async_op=True)
    whole_MK = whole_MK.contiguous()
    if sum_gradient is None:
        return whole_MK, None
    return whole_MK, dist.all_reduce(whole_MK, group=sum_gradient, async_op=True)


def _gathered(x_LK: torch.Tensor, group: Group) -> torch.Tensor:
    """Rows of all ranks."""
    out = x_LK.new_empty(x_LK.shape[0] * dist.get_world_size(group), x_LK.shape[1])
    dist.all_gather_into_tensor(out, x_LK.contiguous(), group=group)
    return out


def _gathered_columns(kept_KL: torch.Tensor, num_padded: int, group: Group) -> torch.Tensor:
    """(K, P): the columns of all ranks, then zeros."""
    (inputs, own), ranks = kept_KL.shape, dist.get_world_size(group)
    parts = torch.empty((ranks * inputs, own), dtype=torch.uint8, device=kept_KL.device)
    dist.all_gather_into_tensor(parts, kept_KL.view(torch.uint8), group=group)
    out = torch.zeros((inputs, num_padded), dtype=torch.uint8, device=kept_KL.device)
    out[:, : ranks * own].view(inputs, ranks, own).copy_(parts.view(ranks, inputs, own).transpose(0, 1))
    return out.view(kept_KL.dtype)
