"""Bytes of weights, gradients and optimizer state, by number format and by what is split over ranks."""

from __future__ import annotations

from typing import NamedTuple

from megavlm.config.schema import PrecisionConfig


class StateBytes(NamedTuple):
    """Bytes of one parameter that trains, on one rank."""

    weight: float
    gradient: float
    optimizer: float


def state_bytes(precision: PrecisionConfig, shards: int = 1, zero: int = 1, *, offloads: bool = False) -> StateBytes:
    """`shards` ranks share what `zero` (parallel.zero) splits.

    Up to ZeRO-1 the table of megatron-core's docs, api-guide/dist_optimizer: fp32 4 + 4 + 8/shards; 16-bit with fp32 gradients
    2 + 4 + 12/shards; 16-bit with 16-bit gradients 2 + 2 + 16/shards (fp32 master weight, its fp32 gradient, two moments). From ZeRO-2 on
    the split fp32 weight is the master: (4 + 4 + 8)/shards; what is gathered comes on top (`gathered_bytes`). `offloads`: the moments are
    in host memory.
    """
    split = shards if zero else 1
    moments = 0 if offloads else 8
    if zero >= 2:
        return StateBytes(4 / split, 4 / split, moments / split)
    if precision.dtype == "fp32":
        return StateBytes(4, 4, moments / split)
    masters = 4 if precision.grad_reduce_in_fp32 else 8
    return StateBytes(2, 4 if precision.grad_reduce_in_fp32 else 2, (masters + moments) / split)


def element_bytes(precision: PrecisionConfig) -> int:
    """Bytes of an activation or of a parameter that is computed with."""
    return 4 if precision.dtype == "fp32" else 2


def gathered_bytes(zero: int, precision: PrecisionConfig, layers: list[tuple[int, int]], outside: tuple[int, int]) -> int:
    """Bytes of gathered parameters and of gradients on their way to their owners, at their most.

    `layers` are (parameters, those that train) of each transformer layer of this rank, `outside` the same of all else. ZeRO-2 keeps all
    parameters gathered, ZeRO-3 what is outside layers and two layers: the one that runs and the one that is on its way. Gradients of one
    layer exist twice, as they are computed and as they are reduced; those outside layers until the end of the backward pass.
    """
    if zero < 2:
        return 0
    each = element_bytes(precision)
    reduced = 4 if precision.grad_reduce_in_fp32 else each
    largest = sorted((number for number, _ in layers), reverse=True)
    parameters = outside[0] + (sum(largest) if zero == 2 else sum(largest[:2]))
    reducing = max([trained for _, trained in layers] + [outside[1]])
    return parameters * each + (outside[1] + reducing) * each + reducing * reduced
