"""FLOPs of a family's model as torch counts them, beside the planner's; runs in a rank of a pool."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megavlm.config.schema import ModelConfig, StageConfig
from megavlm.data.prompt import Prompt, prompt_batch
from megavlm.data.types import PackedBatch
from megavlm.models.freezing import apply_freezing
from megavlm.models.language.cross import sight_of
from megavlm.planner.flops import VisionWork
from megavlm.planner.pictures import PictureDealer
from megavlm.testing.families.in_ranks import loaded


@dataclass(frozen=True)
class Counted:
    """One pack, forward and backward."""

    lengths: list[int]
    work: VisionWork
    num_targets: int
    grids: list[tuple[int, int]]
    """Patches of each picture or tile."""
    forward: int
    backward: int


def counted_flops(folder: Path, prompts: list[Prompt], image_token: int, stages: list[StageConfig]) -> list[Counted]:
    """All prompts as one pack, every third row a target, under each stage's freezing."""
    (chunk,), model, _ = loaded(folder, {})
    return [_count(chunk, model, prompts, image_token, stage) for stage in stages]


def _count(chunk: Any, model: ModelConfig, prompts: list[Prompt], image_token: int, stage: StageConfig) -> Counted:
    apply_freezing([chunk], stage)
    chunk.train()
    batch = _with_targets(prompt_batch(prompts, image_token, model), model.language.vocab_size)
    counts = []
    # The general kernel is the one whose products torch can count.
    with sdpa_kernel(SDPBackend.MATH):
        with _counter() as counter:
            total = chunk(batch).total
        counts.append(counter.get_total_flops())
        with _counter() as counter:
            if total.requires_grad:
                total.backward()
        counts.append(counter.get_total_flops())
    side = model.vision.grid_side
    grids = list(batch.tile_grids) if batch.tile_grids else [(side, side)] * batch.num_tiles
    return Counted(batch.segment_lengths, _work(batch, model), len(batch.target_ids_Q), grids, *counts)


def _counter() -> FlopCounterMode:
    # torch counts addmm and forgets addmm_, with which the head adds up its weight's gradient.
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: _addmm_})


def _addmm_(_: Any, left: Any, right: Any, **__: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


def _with_targets(batch: PackedBatch, vocab_size: int) -> PackedBatch:
    rows = torch.arange(0, batch.num_tokens - 1, 3)
    ids = torch.arange(len(rows)) % vocab_size
    segments = torch.zeros_like(rows)
    return replace(batch, target_positions_Q=rows, target_ids_Q=ids, target_weights_Q=torch.ones(len(rows)), target_segments_Q=segments)


def _work(batch: PackedBatch, model: ModelConfig) -> VisionWork:
    """As data/index.py counts it when it plans."""
    if not batch.num_tiles:
        return VisionWork()
    tiles = [picture.tiles for picture in batch.picture_tiles] if batch.picture_tiles is not None else None
    looks = 0
    if model.language.cross_attention is not None:
        sight = sight_of(model, batch, None)
        looks = sum(look.length * sum(number for _, number in look.features) for look in sight.looks)
    works = [picture.work for picture in PictureDealer(model, 1, 4).pictures(batch.num_tiles, batch.tile_grids, tiles)]
    return VisionWork.total(works)._replace(looks=looks)
