"""What a stage trains on, as people see it: its first pictures with their conversations."""

from __future__ import annotations

from typing import Any

import torch

from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.blends import rows_and_weights
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.types import PackedBatch, StepData
from megavlm.models.vision.pictures import split_pictures
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
    """(tiles or pictures, text) of each segment that has a picture."""
    if batch.tiles_TCHW is None and batch.pixels_X is None:
        return []
    if stage.objective == "vision_classification":
        assert batch.tiles_TCHW is not None
        return [([tile], f"{stage.num_classes} patch classes") for tile in batch.tiles_TCHW]
    shown, shown_by_N = _shown(batch, recipe)
    found, start = [], 0
    for number, (length, sample) in enumerate(zip(batch.segment_lengths, batch.segment_samples, strict=True)):
        mine = shown_by_N[(batch.image_positions_N >= start) & (batch.image_positions_N < start + length)]
        if sample is not None and len(mine):
            text = tokenizer.decode([int(t) for t in batch.tokens_S[start : start + length] if t != tokenizer.image_token_id])
            targets = tokenizer.decode(batch.target_ids_Q[batch.target_segments_Q == number].tolist())
            pictures = [shown[i] for i in mine[mine >= 0].unique().tolist()]
            found.append((pictures, f"{text[:_SHOWN_CHARACTERS]}\nlearns: {targets[:_SHOWN_CHARACTERS]}"))
        start += length
    return found


def _shown(batch: PackedBatch, recipe: Recipe) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Tiles, or pictures in their own size, each (C, H, W); and which of them each visual token shows, -1: none (the end of a row)."""
    model = recipe.model
    reads = model.language.cross_attention is not None  # a token a picture
    if batch.tile_grids is not None:
        assert batch.pixels_X is not None
        pictures = split_pictures(batch.pixels_X, batch.tile_grids, model.vision.num_channels, model.vision.patch_size_px)
        if reads:
            return pictures, torch.arange(len(pictures))
        tokens = torch.tensor([model.visual_tokens(rows, columns) for rows, columns in batch.tile_grids])
        return pictures, torch.repeat_interleave(torch.arange(len(pictures)), tokens)
    assert batch.tiles_TCHW is not None
    if reads:
        tiles = torch.tensor([picture.tiles for picture in batch.picture_tiles or ()])
        return list(batch.tiles_TCHW), tiles.cumsum(0) - tiles  # the first tile of each
    rows_N = torch.arange(len(batch.image_positions_N)) if batch.feature_rows_N is None else batch.feature_rows_N
    rows = rows_and_weights(rows_N)[0]
    first_N = rows if rows.dim() == 1 else rows[:, 0]
    return list(batch.tiles_TCHW), torch.where(first_N < 0, -1, first_N // model.visual_tokens_per_tile)


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
