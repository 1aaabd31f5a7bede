"""What a stage trains on, as people see it: its first pictures with their conversations."""

from __future__ import annotations

from typing import Any

import torch

from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.types import PackedBatch, StepData
from megavlm.parallel.context import ParallelContext
from megavlm.tracking.tracker import Tracker

_SHOWN_CHARACTERS = 160


def log_sample_pictures(
    tracker: Tracker, recipe: Recipe, stage: StageConfig, data: StepData, tokenizer: Tokenizer, ctx: ParallelContext
) -> None:
    """Log `tracking.num_sample_pictures` samples of the stage's first step: tiles, text, and what of it is supervised."""
    wanted = recipe.tracking.num_sample_pictures
    if ctx.rank != 0 or wanted == 0:
        return
    shown = [s for batch in data.microbatches for s in _samples(batch, recipe, stage, tokenizer)][:wanted]
    if shown:
        tracker.picture(f"{stage.name}-samples", _figure(shown))


def _samples(batch: PackedBatch, recipe: Recipe, stage: StageConfig, tokenizer: Tokenizer) -> list[tuple[list[torch.Tensor], str]]:
    """(tiles, text) of each segment that has a picture."""
    if batch.tiles_TCHW is None:
        return []
    if stage.objective == "vision_classification":
        return [([tile], f"{stage.num_classes} patch classes") for tile in batch.tiles_TCHW]
    per_tile, found, start, tile = recipe.model.visual_tokens_per_tile, [], 0, 0
    image_token = tokenizer.image_token_id
    for number, (length, sample) in enumerate(zip(batch.segment_lengths, batch.segment_samples, strict=True)):
        tokens = batch.tokens_S[start : start + length]
        num_tiles = int((tokens == image_token).sum()) // per_tile
        if sample is not None and num_tiles:
            text = tokenizer.decode([int(t) for t in tokens if t != image_token])
            targets = tokenizer.decode(batch.target_ids_Q[batch.target_segments_Q == number].tolist())
            found.append(
                (list(batch.tiles_TCHW[tile : tile + num_tiles]), f"{text[:_SHOWN_CHARACTERS]}\nlearns: {targets[:_SHOWN_CHARACTERS]}")
            )
        start, tile = start + length, tile + num_tiles
    return found


def _figure(samples: list[tuple[list[torch.Tensor], str]]) -> Any:
    from matplotlib.figure import Figure

    columns = max(len(tiles) for tiles, _ in samples)
    figure = Figure(figsize=(2 + 1.6 * columns + 4, 1.8 * len(samples)), layout="constrained")
    grid = figure.subplots(len(samples), columns + 1, squeeze=False, width_ratios=[1.0] * columns + [3.0])
    for row, (tiles, text) in zip(grid, samples, strict=True):
        for axis in row:
            axis.set_axis_off()
        for axis, tile in zip(row, tiles, strict=False):
            axis.imshow(tile.permute(1, 2, 0).numpy())
        row[-1].text(0.0, 0.5, text.replace("$", r"\$"), va="center", family="monospace", size=7, wrap=True)
    return figure
