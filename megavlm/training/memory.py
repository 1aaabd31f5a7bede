"""The most memory that each rank needed in training steps, beside what the planner expected of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megavlm.config.schema import ParallelConfig, Recipe, StageConfig
from megavlm.data.types import StepPlan
from megavlm.parallel.context import ParallelContext
from megavlm.planner.context import segments_of
from megavlm.planner.memory import Fullest, RankMemory, estimate_memory
from megavlm.tracking.process_memory import ProcessMemory


class CudaMemory:
    """What tensors take on the device, as torch's allocator counts it, since this was made."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.reset_peak_memory_stats(device)

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device)

    def reserved_bytes(self) -> int:
        """What the allocator has taken from the device: tensors, fragmentation, and what it keeps for the next."""
        return torch.cuda.max_memory_reserved(self._device)

    def restart(self) -> None:
        """The peak stays: saving and measuring take less on the device than a step does, and others may read it."""


class MemoryWatch:
    """One stage's on this rank. Make it before the stage's model is built.

    On a GPU the peak is that of tensors. On a CPU it is the growth of the process since then: data, Python, and freed memory that the
    C library keeps are in it. Saving and measuring are not training, and what they take on a CPU is left out (`aside`).
    """

    def __init__(self, recipe: Recipe, stage: StageConfig, layout: ParallelConfig, ctx: ParallelContext) -> None:
        # An earlier stage's model may wait in cycles to be collected.
        gc.collect()
        self._recipe, self._stage, self._layout, self._ctx = recipe, stage, layout, ctx
        self._source = CudaMemory(ctx.device) if ctx.device.type == "cuda" else ProcessMemory()
        self._peak = 0
        self._fullest = Fullest()
        self._canvas = recipe.model.vision.num_patches if recipe.model.vision.canvas is not None else None

    def saw(self, plan: StepPlan) -> None:
        """A step of this plan was made."""
        microbatches = [microbatch for rank in plan.assignment for microbatch in rank]
        for packs in microbatches:
            patches = sum(pack.vision.patches for pack in packs)
            tiles = sum(pack.num_tiles for pack in packs) if self._canvas is None else patches // self._canvas
            segments = len(segments_of(packs, self._recipe.data.seq_len_tokens)) if self._layout.context > 1 else 0
            found = Fullest(tiles, patches, sum(pack.num_targets for pack in packs), segments)
            self._fullest = Fullest(*map(max, zip(self._fullest, found, strict=True)))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside is not training."""
        self._peak = self.peak_bytes
        try:
            yield
        finally:
            self._source.restart()

    @property
    def peak_bytes(self) -> int:
        """This rank's most so far."""
        return max(self._peak, self._source.peak_bytes())

    @property
    def reserved_bytes(self) -> int | None:
        """On a GPU what the allocator took from the device, at its most."""
        return self._source.reserved_bytes() if isinstance(self._source, CudaMemory) else None

    def estimates(self) -> list[RankMemory]:
        """What the planner expects of each pipeline rank for the fullest microbatches so far."""
        recipe, device = self._recipe, self._ctx.device.type
        return estimate_memory(
            recipe.model,
            self._stage,
            recipe.data,
            self._ctx.grid,
            self._layout,
            recipe.precision,
            device="cuda" if device == "cuda" else "cpu",
            fullest=self._fullest,
        )
