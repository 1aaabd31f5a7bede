"""The encoder in another layout than the LLM: whole on every tensor rank, its pictures dealt to the ranks that share a microbatch.

Gradients, once and for all. Each rank's gradient of an encoder weight comes from the pictures that it encoded. Data and context ranks are
summed by megatron-core's gradient reduction; tensor ranks by `finalize_gradients`, behind it. So every picture must count on one tensor
rank only: where all tensor ranks encode all pictures, each passes on its share of the gradient (`shared_gradient`).

Shape legend: R rows of one rank, N rows of all pictures in the pack's order, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.distributed.tensor import DTensor

from megavlm.parallel.context import ParallelContext
from megavlm.tracking.timers import part
from megavlm_kernels.transfer import to_device

REDUCED_AT_A_TIME = 1 << 24
"""Elements of small gradients that are copied together for one reduction; larger ones are reduced in place."""

# Renamed in torch 2.13.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class RowLayout:
    """Which rank of a microbatch has which rows, and where they belong. Ranks are numbered tensor first, then context."""

    counts: tuple[int, ...]
    """Rows of each rank."""
    order_N: torch.Tensor
    """Row of the gathered, padded (ranks x longest) rows that stands at each place of the pack's order."""
    places_R: torch.Tensor
    """Place in the pack's order of each row of this rank's, and of the ranks that differ from it in context alone, each padded with N."""
    ctx: ParallelContext

    @property
    def longest(self) -> int:
        """Most rows of a rank."""
        return max(self.counts)

    @classmethod
    def of(cls, first_rows: Sequence[int], shares: Sequence[Sequence[int]], ctx: ParallelContext) -> RowLayout:
        """`first_rows`: where each item's rows begin in the pack's order, and their number; `shares`: items of each rank, ascending."""
        places = [_joined([torch.arange(first_rows[i], first_rows[i + 1]) for i in share]) for share in shares]
        longest, total = max(p.numel() for p in places), first_rows[-1]
        order_N = torch.empty(total, dtype=torch.int64)
        for rank, own in enumerate(places):
            order_N[own] = torch.arange(own.numel()) + rank * longest
        mine = [torch.nn.functional.pad(places[r], (0, longest - places[r].numel()), value=total) for r in _same_tensor_rank(ctx)]
        order_N, places_R = (to_device(rows, ctx.device) for rows in (order_N, torch.cat(mine)))
        return cls(tuple(p.numel() for p in places), order_N, places_R, ctx)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)


def _same_tensor_rank(ctx: ParallelContext) -> list[int]:
    """Numbers of the ranks of a microbatch that have this rank's place on the tensor axis, by context rank."""
    return [context * ctx.grid.tensor + ctx.tensor_rank for context in range(ctx.grid.context)]


def gather_rows(rows_RD: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """(N, D) in the pack's order on every rank of the microbatch, from each rank's own rows (R, D).

    Every one of them must call this, and run its backward pass, in the same order. Upstream gradients are taken as the LLM makes them:
    whole on every tensor rank, in parts on context ranks. The owner of a row gets its whole gradient.

    Raises ValueError when this rank's rows are not as many as the layout says.
    """
    number = dist.get_rank(layout.ctx.microbatch_group)
    if rows_RD.shape[0] != layout.counts[number]:
        raise ValueError(
            f"{rows_RD.shape[0]} visual features of this rank's pictures, where the batch says {layout.counts[number]}: "
            "the data were prepared for another model.vision or model.projector"
        )
    gathered: torch.Tensor = _GatherRows.apply(rows_RD, layout)  # type: ignore[no-untyped-call]
    return gathered


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: torch.Tensor, layout: RowLayout) -> torch.Tensor:
        ctx.layout, ctx.num_rows = layout, rows_RD.shape[0]
        padded = torch.nn.functional.pad(rows_RD, (0, 0, 0, layout.longest - rows_RD.shape[0])).contiguous()
        gathered = padded.new_empty(len(layout.counts) * layout.longest, padded.shape[1])
        with part("communication"):
            _all_gather(gathered, padded, group=layout.ctx.microbatch_group)
        return gathered.index_select(0, layout.order_N)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        layout, (gradient_ND,) = ctx.layout, gradients
        # Place N, of padding, is a row of zeros.
        taken = torch.nn.functional.pad(gradient_ND, (0, 0, 0, 1)).index_select(0, layout.places_R)
        own = taken
        if layout.ctx.grid.context > 1:
            own = taken.new_empty(layout.longest, taken.shape[1])
            with part("communication"):
                _reduce_scatter(own, taken, group=layout.ctx.context_group)
        return own[: ctx.num_rows], None


def shared_gradient(rows_ND: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
    """The rows as they are; of their gradient each tensor rank passes on an equal share, because the shares are summed later."""
    shared: torch.Tensor = _SharedGradient.apply(rows_ND, ctx.grid.tensor)  # type: ignore[no-untyped-call]
    return shared


class _SharedGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: torch.Tensor, ranks: int) -> torch.Tensor:
        ctx.ranks = ranks
        return rows_ND.view_as(rows_ND)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0] / ctx.ranks, None


def finalize_gradients(chunks: list[torch.nn.Module], *args: Any, **options: Any) -> None:
    """megatron-core's `finalize_model_grads`, then the sum over tensor ranks of what each computed from pictures of its own.

    Chunks name these parameters in `summed_over_tensor()`. Behind the reduction over data ranks, so that a distributed optimizer's part of
    a gradient is the same on all of them. What tensor ranks computed alike (`copied_over_tensor()`) is averaged where run.deterministic is
    off: kernels that add up in no fixed order would let copies of a weight drift apart.
    """
    with part("communication"):
        _finalize(chunks, *args, **options)


def _finalize(chunks: list[torch.nn.Module], *args: Any, **options: Any) -> None:
    finalize_model_grads(chunks, *args, **options)
    for chunk in chunks:
        bare: Any = getattr(chunk, "module", chunk)
        if not hasattr(bare, "summed_over_tensor") or bare.ctx.grid.tensor == 1:
            continue
        _sum(_gradients(bare.summed_over_tensor()), bare.ctx)
        if not torch.are_deterministic_algorithms_enabled():
            copies = _gradients(bare.copied_over_tensor())
            _sum(copies, bare.ctx)
            for gradient in copies:
                gradient.div_(bare.ctx.grid.tensor)


def _gradients(parameters: Iterable[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [gradient for parameter in parameters if (gradient := _gradient(parameter)) is not None]


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor | None:
    """What the optimizer will read; of a sharded one this rank's part."""
    if not parameter.requires_grad:
        return None
    gradient: torch.Tensor | None = getattr(parameter, "main_grad", None)
    gradient = parameter.grad if gradient is None else gradient
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


def _sum(gradients: Sequence[torch.Tensor], ctx: ParallelContext) -> None:
    """Sum in place over tensor ranks."""
    small: list[torch.Tensor] = []
    for gradient in gradients:
        if gradient.numel() >= REDUCED_AT_A_TIME and gradient.is_contiguous() and gradient.device.type == ctx.device.type:
            dist.all_reduce(gradient, group=ctx.tensor_group)
        else:
            small.append(gradient)
            if sum(g.numel() for g in small) >= REDUCED_AT_A_TIME:
                _sum_together(small, ctx)
                small = []
    _sum_together(small, ctx)


def _sum_together(gradients: Sequence[torch.Tensor], ctx: ParallelContext) -> None:
    for own in _by_format(gradients).values():
        joined = _flatten_dense_tensors(own).to(ctx.device)  # offloaded gradients lie on the host
        dist.all_reduce(joined, group=ctx.tensor_group)
        for gradient, summed in zip(own, _unflatten_dense_tensors(joined, own), strict=True):
            gradient.copy_(summed)


def _by_format(gradients: Sequence[torch.Tensor]) -> dict[torch.dtype, list[torch.Tensor]]:
    found: dict[torch.dtype, list[torch.Tensor]] = {}
    for gradient in gradients:
        found.setdefault(gradient.dtype, []).append(gradient)
    return found
