"""What a step cost and achieved, in honest units: real tokens, real FLOPs, vision included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megavlm.config.schema import ParallelConfig, Recipe, StageConfig
from megavlm.data.types import PackPlan, StepPlan
from megavlm.planner.context import pad_rows, segments_of
from megavlm.planner.flops import FlopsModel
from megavlm.planner.pictures import copies_of_pictures
from megavlm.planner.recompute import recomputed
from megavlm.planner.stages import PackShape, pack_cost
from megavlm.tracking.hardware import Dtype, peak_tflops


class Accountant:
    """Turns step plans and times into a metrics record.

    MFU counts the FLOPs that samples need (https://arxiv.org/abs/2204.02311, appendix B): no padding, nothing twice. HFU counts what ranks
    compute: padding at packs' ends and of context ranks, layers that parallel.recompute runs again, and pictures that several of the
    ranks which share a microbatch encode. `layout` is the stage's own (None: the recipe's).
    """

    def __init__(
        self, recipe: Recipe, stage: StageConfig, world_size: int, device_name: str | None, layout: ParallelConfig | None = None
    ) -> None:
        peak = recipe.tracking.peak_tflops_per_rank
        if peak is None:
            peak = peak_tflops(device_name, peak_dtype(recipe, stage, device_name))
        self._peak_flops_per_s = peak * 1e12 * world_size
        self._recipe = recipe
        self._flops = FlopsModel(recipe.model, stage)
        self._again = recomputed(layout or recipe.parallel, recipe.model)
        self._is_classification = stage.objective == "vision_classification"
        # Encoder pretraining gives every rank pictures of its own.
        self._copies = {} if self._is_classification else copies_of_pictures(recipe.model, recipe.parallel)

    def record(self, plan: StepPlan, step_time_s: float, data_wait_s: float, pack_tokens: int, context: int = 1) -> dict[str, Any]:
        """Counts over all data-parallel ranks, from the plan alone: no communication.

        `tokens` counts what the hardware processed, padding included, that of the `context` ranks which share a pack too;
        `useful_tokens` what belongs to a sample; `computed_patches` those that encoders processed, `patches` those of pictures; rates and
        MFU are of useful work.
        """
        microbatches = [microbatch for rank in plan.assignment for microbatch in rank]
        packs = [pack for microbatch in microbatches for pack in microbatch]
        tokens, pads = len(packs) * pack_tokens, 0
        if context > 1:
            pads = sum(pad_rows(segments_of(microbatch, pack_tokens), self._recipe.parallel) for microbatch in microbatches)
        useful = sum(sum(pack.lengths_tokens) for pack in packs)
        places = sum(pack.vision.patches for pack in packs)
        tiles = sum(pack.num_tiles for pack in packs)
        flops, vision = sum(pack.flops for pack in packs), self._recipe.model.vision
        computed = self.computed_flops(packs, pack_tokens, pads)
        return {
            "tokens": tokens + pads,
            "useful_tokens": useful,
            "target_tokens": sum(pack.num_targets for pack in packs),
            "samples": sum(len(pack.samples) for pack in packs),
            "tiles": tiles,
            # A canvas has places that no tile fills; they go through the encoder too.
            "patches": places if vision.canvas is None else tiles * vision.num_patches,
            "computed_patches": places * self._copies.get("vision", 1),
            "pack_fill": useful / (tokens + pads),
            "step_time_s": step_time_s,
            "data_wait_s": data_wait_s,
            "tokens_per_s": useful / step_time_s,
            "tflops": flops / step_time_s / 1e12,
            "mfu": flops / step_time_s / self._peak_flops_per_s,
            "hfu": computed / step_time_s / self._peak_flops_per_s,
        }

    def computed_flops(self, packs: Sequence[PackPlan], pack_tokens: int, pads: int = 0) -> int:
        """What ranks compute for these packs: each filled up to `pack_tokens`, which is a segment of its own; `pads` rows of context
        ranks, which attend to nothing; recomputed layers; and every copy of the encoder's work."""
        total = 0
        for pack in packs:
            lengths = list(pack.lengths_tokens)
            if not self._is_classification and (rest := pack_tokens - sum(lengths)) > 0:
                lengths.append(rest)
            cost = pack_cost(self._flops, PackShape(lengths, pack.vision, pack.num_targets), self._again, self._copies)
            total += sum(work.total for work in cost)
        return total + pads * self._flops.a_row()


def peak_dtype(recipe: Recipe, stage: StageConfig, device_name: str | None) -> Dtype:
    """Number format of the peak that MFU and HFU are shares of: FP8 where any layer that the stage runs multiplies in it, so that FP8
    is never flattered; a CPU (`device_name` None) computes FP8 products in other formats."""
    runs = {"vision_classification": {"vision"}, "text": {"language"}}.get(stage.objective, {"vision", "projector", "language"})
    in_fp8 = recipe.precision.fp8 != "none" and runs - set(recipe.precision.keep_bf16)
    return "fp8" if in_fp8 and device_name is not None else recipe.precision.dtype
