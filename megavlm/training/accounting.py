"""What a step cost and achieved, in honest units: real tokens, real FLOPs, vision included."""

from __future__ import annotations

from typing import Any

from megavlm.config.schema import Recipe
from megavlm.data.types import StepPlan
from megavlm.planner.context import pad_rows, segments_of
from megavlm.tracking.hardware import peak_tflops


class Accountant:
    """Turns step plans and times into a metrics record. FLOPs are those of real segments; recomputation is not counted."""

    def __init__(self, recipe: Recipe, world_size: int, device_name: str | None) -> None:
        peak = recipe.tracking.peak_tflops_per_rank
        if peak is None:
            peak = peak_tflops(device_name, recipe.precision.dtype)
        self._peak_flops_per_s = peak * 1e12 * world_size
        self._recipe = recipe

    def record(self, plan: StepPlan, step_time_s: float, data_wait_s: float, pack_tokens: int, context: int = 1) -> dict[str, Any]:
        """Counts over all data-parallel ranks, from the plan alone: no communication.

        `tokens` counts what the hardware processed, padding included, that of the `context` ranks which share a pack too;
        `useful_tokens` what belongs to a sample; rates and MFU (https://arxiv.org/abs/2204.02311, appendix B) are of useful work.
        """
        microbatches = [microbatch for rank in plan.assignment for microbatch in rank]
        packs = [pack for microbatch in microbatches for pack in microbatch]
        tokens = len(packs) * pack_tokens
        if context > 1:
            tokens += sum(pad_rows(segments_of(microbatch, pack_tokens), self._recipe.parallel) for microbatch in microbatches)
        useful = sum(sum(pack.lengths_tokens) for pack in packs)
        flops = sum(pack.flops for pack in packs)
        return {
            "tokens": tokens,
            "useful_tokens": useful,
            "target_tokens": sum(pack.num_targets for pack in packs),
            "samples": sum(len(pack.samples) for pack in packs),
            "tiles": sum(pack.num_tiles for pack in packs),
            "pack_fill": useful / tokens,
            "step_time_s": step_time_s,
            "data_wait_s": data_wait_s,
            "tokens_per_s": useful / step_time_s,
            "tflops": flops / step_time_s / 1e12,
            "mfu": flops / step_time_s / self._peak_flops_per_s,
        }
