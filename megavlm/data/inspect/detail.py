"""One pack read and decoded: its samples' tokens and pictures, its attention mask.

Shape legend: S packed sequence, L rows of one sample, T tiles, C channels, H height, W width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch

from megavlm.config.schema import ImageConfig
from megavlm.data.images import ImageError
from megavlm.data.index import SampleIndex
from megavlm.data.inspect.opened import OpenStage
from megavlm.data.inspect.pictures import data_uri, grid_frame, mask_uri
from megavlm.data.inspect.tokens import token_runs
from megavlm.data.inspect.views import Frame, PackView, PictureView, TokenRun
from megavlm.data.materialise import Materialiser, patch_labels
from megavlm.data.resizing import PictureGrid
from megavlm.data.sample import ImageEntry, Sample
from megavlm.data.types import PackedBatch, PackPlan

ORIGINAL_PX = 640
"""Longer side of an original on the page."""
TILE_PX = 224


class PackReader:
    """Reads packs of one stage for showing."""

    def __init__(self, opened: OpenStage) -> None:
        self._opened = opened
        self._classifies = opened.stage.objective == "vision_classification"
        self._materialise = Materialiser(opened.recipe, opened.stage, opened.indexes, opened.tokenizer, needs_tiles=True)
        self._image = ImageConfig() if self._classifies else opened.recipe.data.image

    def read(self, pack: PackPlan, view: PackView) -> PackView:
        """`view` with everything that only reading shows.

        Raises:
            MaterialiseError: the shards differ from their index.
        """
        batch = self._materialise([pack])
        pixels = _Pixels(batch, self._opened.recipe.model.vision.patch_size_px, self._opened.recipe.model.vision.num_channels)
        bad = {(record["source"], record["row"]): str(record["reason"]) for record in batch.metadata["bad_samples"]}  # type: ignore[attr-defined]
        visual_S = _marked(batch, batch.image_positions_N)
        ends = np.cumsum(batch.segment_lengths)
        segments = {i: (int(end) - length, int(end)) for i, (end, length) in enumerate(zip(ends, batch.segment_lengths, strict=True))}
        places = [i for i, ref in enumerate(batch.segment_samples) if ref is not None]
        samples = []
        for place, sample in zip(places, view.samples, strict=True):
            index = self._opened.indexes[sample.source]
            content = index.sample(sample.row)
            chosen = batch.target_segments_Q == place
            weights = batch.target_weights_Q[chosen]
            runs = [] if self._classifies else self._runs(batch, place, *segments[place], visual_S)
            problem = bad.get((sample.source, sample.row))
            samples.append(
                replace(
                    sample,
                    weight=float(weights.mean()) if len(weights) else None,
                    problem=problem,
                    where=index.where(sample.row),
                    runs=tuple(runs),
                    pictures=tuple(self._pictures(index, sample.row, content, pixels)),
                )
            )
        return replace(view, samples=tuple(samples), mask=self._mask(batch, visual_S))

    def _runs(self, batch: PackedBatch, place: int, start: int, stop: int, visual_S: np.ndarray) -> list[TokenRun]:
        chosen = batch.target_segments_Q == place
        # Row i predicts token i + 1.
        predicted = batch.target_positions_Q[chosen].numpy() + 1
        target_S = np.zeros(batch.num_tokens + 1, dtype=bool)
        muted_S = target_S.copy()
        target_S[predicted] = True
        muted_S[predicted] = batch.target_weights_Q[chosen].numpy() == 0
        cut = slice(start, stop)
        return token_runs(self._opened.tokenizer, batch.tokens_S[cut].numpy(), target_S[cut], muted_S[cut], visual_S[cut])

    def _mask(self, batch: PackedBatch, visual_S: np.ndarray) -> str:
        colours: list[int | None] = []
        for ref in batch.segment_samples:
            colours.append(None if ref is None else sum(c is not None for c in colours))
        if self._classifies:
            visual_S = np.zeros_like(visual_S)
        return mask_uri(batch.segment_lengths, colours, visual_S, is_causal=not self._classifies)

    def _pictures(self, index: SampleIndex, row: int, sample: Sample, pixels: _Pixels) -> list[PictureView]:
        recipe = self._opened.recipe
        grids = index.grids(row)
        views = []
        for number, (entry, grid) in enumerate(zip(sample.images, grids, strict=True)):
            views.append(self._picture(entry, grid, self._original(index, row, number), pixels))
        if self._classifies:
            vision, background = recipe.model.vision, int(self._opened.stage.num_classes or 0) - 1
            labels = patch_labels(sample, vision.image_size_px, vision.patch_size_px, background)
            side = vision.image_size_px // vision.patch_size_px
            views = [replace(v, labels=tuple(map(tuple, labels.reshape(side, side).tolist())), background=background) for v in views]
        return views

    def _original(self, index: SampleIndex, row: int, number: int) -> str | None:
        try:
            return data_uri(self._materialise.decoder.decode(index.image(row, number)), ORIGINAL_PX)
        except ImageError:
            return None

    def _picture(self, entry: ImageEntry, grid: PictureGrid, original: str | None, pixels: _Pixels) -> PictureView:
        native = self._materialise.resizing.native
        tiles = pixels.native(grid) if native else pixels.tiles(grid.work.tiles)
        side = pixels.patch_px if native else self._opened.recipe.model.vision.image_size_px
        width, height = grid.cols * side, grid.rows * side
        thumbnail: Literal["none", "first", "last"] = "none"
        if grid.thumbnail:
            thumbnail = "first" if self._image.policy == "anyres" else "last"
        return PictureView(
            file=entry.file,
            width=entry.width,
            height=entry.height,
            time_s=entry.time_s,
            original=original,
            frame=Frame(0.0, 0.0, 1.0, 1.0) if native else grid_frame(self._image, entry.width, entry.height, width, height),
            cols=grid.cols,
            rows=grid.rows,
            unit="patch" if native else "tile",
            resized_px=(width, height),
            tokens=grid.tokens,
            tiles=tuple(tiles),
            thumbnail=thumbnail,
        )


class _Pixels:
    """A batch's pixels, handed out picture by picture."""

    def __init__(self, batch: PackedBatch, patch_px: int, num_channels: int) -> None:
        self.patch_px, self._channels = patch_px, num_channels
        self._tiles, self._flat = batch.tiles_TCHW, batch.pixels_X
        self._at = 0

    def tiles(self, count: int) -> list[str]:
        """The next `count` tiles."""
        assert self._tiles is not None, "the batch has no tiles"
        found, self._at = self._tiles[self._at : self._at + count], self._at + count
        return [data_uri(tile_CHW.permute(1, 2, 0).numpy(), TILE_PX) for tile_CHW in found]

    def native(self, grid: PictureGrid) -> list[str]:
        """The next whole picture."""
        assert self._flat is not None, "the batch has no pixels"
        height, width = grid.rows * self.patch_px, grid.cols * self.patch_px
        size = self._channels * height * width
        found, self._at = self._flat[self._at : self._at + size], self._at + size
        return [data_uri(found.view(self._channels, height, width).permute(1, 2, 0).numpy(), ORIGINAL_PX)]


def _marked(batch: PackedBatch, positions: torch.Tensor) -> np.ndarray:
    """bool (S,), true at `positions`."""
    marked = np.zeros(batch.num_tokens, dtype=bool)
    marked[positions.numpy()] = True
    return marked
