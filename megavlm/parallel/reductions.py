"""Reductions over the grid for numbers that people read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

from megavlm.parallel.context import ParallelContext


def sum_over_data(values: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
    """Sum `values` over data and context ranks of one stage, in place."""
    dist.all_reduce(values, group=ctx.data_context_group)
    return values


def sum_over_data_then_share(values: torch.Tensor, ctx: ParallelContext) -> torch.Tensor:
    """Sum `values` (float64, known on the last pipeline stage) over data and context ranks and hand it to every stage.

    Ranks of earlier stages pass zeros of the same shape. The tensor is changed in place and returned.
    """
    if ctx.is_last_stage:
        sum_over_data(values, ctx)
    if ctx.grid.pipeline > 1:
        last = dist.get_global_rank(ctx.pipeline_group, ctx.grid.pipeline - 1)
        dist.broadcast(values, last, group=ctx.pipeline_group)
    return values


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on all ranks when it is true on one."""
    value = torch.tensor([int(flag)], device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def from_rank_zero(value: Any) -> Any:
    """Rank 0's picklable value, on every rank."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def union_over_ranks(names: Iterable[str]) -> set[str]:
    """Every name that any rank has, on every rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, set(names))
    return set().union(*gathered)
