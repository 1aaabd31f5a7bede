"""The rank grid: which rank stands where on the tensor, context, data and pipeline axes.

Ranks are laid out in megatron-core's default order "tp-cp-ep-dp-pp" (`parallel_state.initialize_model_parallel`): neighbours in
rank share a tensor group, so the chattiest axis stays inside a machine. Ranks that share experts are neighbours on the tensor, context
and data axes, in this order; they are no axis of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from megavlm.config.schema import ParallelConfig, StageConfig
from megavlm.topology.table import text_table

Axis = Literal["tensor", "context", "data", "pipeline"]
AXES: tuple[Axis, ...] = ("tensor", "context", "data", "pipeline")
"""Fastest-varying first."""


class GridError(ValueError):
    """The ranks, the grid's axes or a stage's batch do not fit together."""


class Coordinates(NamedTuple):
    """Place of one rank on each axis, counted from 0."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class RankGrid:
    """Sizes of the axes; tensor x context x data x pipeline = world_size.

    Raises:
        GridError: the axes do not multiply to `world_size`.
    """

    world_size: int
    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    context: int = 1
    data: int = 1
    expert: int = 1
    """Neighbours on the tensor, context and data axes that share the experts of a layer."""

    def __post_init__(self) -> None:
        product_of_axes = self.tensor * self.context * self.data * self.pipeline
        if product_of_axes != self.world_size or product_of_axes < 1:
            raise GridError(
                f"tensor={self.tensor} x context={self.context} x data={self.data} x pipeline={self.pipeline} = {product_of_axes} "
                f"ranks, but world_size={self.world_size}"
            )
        ranks_of_a_layer = self.tensor * self.context * self.data
        if self.expert < 1 or ranks_of_a_layer % self.expert:
            raise GridError(
                f"parallel.expert={self.expert} does not divide the {ranks_of_a_layer} ranks of the tensor, context and data axes: "
                "use a multiple of it (run.num_ranks, --nproc), or change parallel.*"
            )

    @classmethod
    def from_config(cls, parallel: ParallelConfig, world_size: int) -> RankGrid:
        """The grid of `world_size` ranks; data parallelism takes what the other axes leave.

        Raises:
            GridError: `world_size` is not a multiple of tensor x context x pipeline.
        """
        model_ranks = parallel.tensor * parallel.context * parallel.pipeline
        if world_size < 1 or world_size % model_ranks:
            raise GridError(
                f"{world_size} ranks cannot be cut into copies of parallel.tensor={parallel.tensor} x "
                f"parallel.context={parallel.context} x parallel.pipeline={parallel.pipeline} = {model_ranks} ranks: "
                f"use a multiple of {model_ranks} ranks (run.num_ranks, --nproc), or change parallel.*"
            )
        return cls(
            world_size=world_size,
            tensor=parallel.tensor,
            pipeline=parallel.pipeline,
            virtual_pipeline=parallel.virtual_pipeline,
            context=parallel.context,
            data=world_size // model_ranks,
            expert=parallel.expert,
        )

    def size(self, axis: Axis) -> int:
        """Ranks along `axis`."""
        return int(getattr(self, axis))

    def coordinates(self, rank: int) -> Coordinates:
        """Place of `rank`. Raises GridError when it is not in [0, world_size)."""
        if not 0 <= rank < self.world_size:
            raise GridError(f"rank {rank} is not in a grid of {self.world_size} ranks (0 to {self.world_size - 1})")
        place = []
        for axis in AXES:
            rank, position = divmod(rank, self.size(axis))
            place.append(position)
        return Coordinates(*place)

    def rank(self, tensor: int = 0, context: int = 0, data: int = 0, pipeline: int = 0) -> int:
        """Inverse of `coordinates`. Raises GridError when a coordinate lies outside its axis."""
        place = Coordinates(tensor, context, data, pipeline)
        for axis, position in zip(AXES, place, strict=True):
            if not 0 <= position < self.size(axis):
                raise GridError(f"{axis} coordinate {position} is outside the axis of {self.size(axis)} ranks")
        return self._rank(place)

    def groups(self, *axes: Axis) -> list[list[int]]:
        """Ranks that differ only along `axes`, one ascending list per group, groups in order of their first rank.

        `groups("tensor")` are the tensor groups, `groups("data", "context")` those that gradients are reduced over.
        """
        free = [range(self.size(axis)) if axis in axes else (0,) for axis in AXES]
        anchors = [(0,) if axis in axes else range(self.size(axis)) for axis in AXES]
        offsets = sorted(self._rank(place) for place in product(*free))
        return [[anchor + offset for offset in offsets] for anchor in sorted(self._rank(place) for place in product(*anchors))]

    def num_microbatches(self, stage: StageConfig) -> int:
        """Microbatches that each rank runs in one optimizer step of `stage`.

        Raises:
            GridError: packs_per_step is not a multiple of data x micro_batch_packs, or the interleaved pipeline schedule cannot
                take that many microbatches (megatron-core wants a multiple of the pipeline size).
        """
        packs_together = self.data * stage.micro_batch_packs
        if stage.packs_per_step % packs_together:
            raise GridError(
                f"stage {stage.name!r}: packs_per_step={stage.packs_per_step} is not a multiple of data-parallel size {self.data} x "
                f"micro_batch_packs={stage.micro_batch_packs} = {packs_together}: "
                f"use {_neighbours(stage.packs_per_step, packs_together)} packs per step"
            )
        num_microbatches = stage.packs_per_step // packs_together
        if self.virtual_pipeline > 1 and num_microbatches % self.pipeline:
            multiple = packs_together * self.pipeline
            raise GridError(
                f"stage {stage.name!r}: parallel.virtual_pipeline={self.virtual_pipeline} needs microbatches in multiples of "
                f"parallel.pipeline={self.pipeline}, and packs_per_step={stage.packs_per_step} makes {num_microbatches}: "
                f"use {_neighbours(stage.packs_per_step, multiple)} packs per step"
            )
        return num_microbatches

    def table(self, max_rows: int = 64) -> str:
        """The grid as text for --dry-run, one line a rank; beyond `max_rows` ranks the rest is counted, not listed."""
        rows = [(rank, *self.coordinates(rank)) for rank in range(min(self.world_size, max_rows))]
        virtual = f" ({self.virtual_pipeline} chunks each)" if self.virtual_pipeline > 1 else ""
        sizes = f"tensor {self.tensor} x context {self.context} x data {self.data} x pipeline {self.pipeline}"
        experts = f", experts shared by {self.expert}" if self.expert > 1 else ""
        title = f"{self.world_size} ranks = {sizes}{virtual}{experts}"
        text = text_table(("rank", *AXES), rows, title)
        return text if self.world_size <= max_rows else f"{text}\n... and {self.world_size - max_rows} more ranks"

    def _rank(self, place: tuple[int, ...]) -> int:
        """Rank of a place that is known to be inside the grid."""
        strides = [math.prod(self.size(axis) for axis in AXES[:i]) for i in range(len(AXES))]
        return sum(position * stride for position, stride in zip(place, strides, strict=True))


def _neighbours(number: int, multiple: int) -> str:
    """The multiples around `number`, in words."""
    below, above = number // multiple * multiple, (number // multiple + 1) * multiple
    return f"{below} or {above}" if below else str(above)
