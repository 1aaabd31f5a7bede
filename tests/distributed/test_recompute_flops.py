"""What recomputation adds, by the planner and by torch's counter of the model that trains: the difference between MFU and HFU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.config.schema import ModelConfig, ParallelConfig, StageConfig
from megavlm.data.types import PackPlan
from megavlm.models.freezing import apply_freezing
from megavlm.models.init import initialise
from megavlm.parallel.context import enter_grid
from megavlm.planner.flops import FlopsModel, VisionWork
from megavlm.planner.recompute import Again, LayerAgain, recomputed
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import TRAINING, tiny_recipe
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config
from megavlm.training.accounting import Accountant

SAVINGS: list[dict[str, Any]] = [
    {},
    {"recompute": "full"},
    {"recompute_encoder": "full"},
    {"recompute": "full", "recompute_encoder": "none"},
    {"recompute": "full", "recompute_layers": 1},
    {"recompute": "selective"},
    {"recompute": "selective", "recompute_modules": ["mlp"]},
    {"recompute": "selective", "recompute_modules": ["core_attn", "mlp"], "recompute_encoder": "full"},
    {"recompute_encoder": "selective", "recompute_modules": ["mlp"]},
]
# The head's rows are filled up to a multiple of 8: here there is nothing to fill.
MODEL = tiny_model_config(vocab_size=104)


def stage_of(training: str) -> StageConfig:
    return StageConfig(name="s", steps=1, mixture={"a": 1.0}, **TRAINING[training])


def counted(model: ModelConfig, training: str) -> list[int]:
    """FLOPs of a forward and a backward pass under each of SAVINGS."""
    ctx = enter_grid(ParallelConfig(), torch.device("cpu"), 1)
    found = []
    for saving in SAVINGS:
        layout = ParallelConfig(**saving)
        (module,) = tiny_chunks(model, ctx, layout)
        initialise([module], model, 0, ctx)
        apply_freezing([module], stage_of(training))
        # The general kernel is the one whose products torch can count.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(tiny_batch(model)).total.backward()
        found.append(int(counter.get_total_flops()))
    return found


@pytest.mark.parametrize("training", TRAINING)
def test_what_is_added_is_what_torch_counts(training: str, pool: RankPool) -> None:
    """To the last FLOP. The general kernel computes the masked half of causal attention too, in its second run as in its first."""
    plain, *others = pool.run(counted, MODEL, training)[0]
    flops, batch = FlopsModel(MODEL, stage_of(training)), tiny_batch(MODEL)
    work = VisionWork.uniform(batch.num_tiles, MODEL.vision.num_patches)
    additions = set()
    for saving, found in zip(SAVINGS[1:], others, strict=True):
        again = recomputed(ParallelConfig(**saving), MODEL)
        causal = Again((), tuple(LayerAgain(attention=layer.attention) for layer in again.language))
        added = sum(flops.recomputed(batch.segment_lengths, work, again))
        assert found - plain == added + sum(flops.recomputed(batch.segment_lengths, work, causal)), saving
        additions.add(added)
    assert len(additions) > 5, "the choices differ, so a wrong one would show"


def test_hardware_flops_of_a_step_are_what_torch_counts(pool: RankPool) -> None:
    """The whole of it: forward, backward, recomputed."""
    found, batch = pool.run(counted, MODEL, "all")[0], tiny_batch(MODEL)
    work = VisionWork.uniform(batch.num_tiles, MODEL.vision.num_patches)
    pack = PackPlan((), tuple(batch.segment_lengths), work, len(batch.target_ids_Q), 0.0)
    flops = FlopsModel(MODEL, stage_of("all"))
    masked_half = flops.pack(*pack_shape(pack)).by_part["language.attention"]
    for saving, total in zip(SAVINGS, found, strict=True):
        recipe = tiny_recipe("unused", "unused", parallel=saving).model_copy(update={"model": MODEL})
        accountant = Accountant(recipe, stage_of("all"), 1, None)
        again = recomputed(recipe.parallel, MODEL).language
        twice = sum(layer.attention for layer in again) / MODEL.language.num_layers
        extra = masked_half.total + round(twice * masked_half.forward)
        assert accountant.computed_flops([pack], sum(batch.segment_lengths)) == total - extra, saving


def pack_shape(pack: PackPlan) -> tuple[tuple[int, ...], VisionWork, int]:
    return pack.lengths_tokens, pack.vision, pack.num_targets
