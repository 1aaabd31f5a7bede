"""Pictures of a microbatch on several ranks: who encodes which, and modules that are whole on every tensor rank.

The ranks that share a microbatch (tensor x context) each encode and project the pictures that planner/pictures.py deals to them; then the
projected rows of all are gathered. Without pictures of its own a rank encodes a grey tile and gives none of its rows: so every rank runs
the same modules and the same collectives, forward and backward, and reductions that count gradients find one for every weight.

Shape legend: T tiles, C channels, X pixels of all pictures, R projector rows of this rank's pictures, N of all pictures, W words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch
from megatron.core.transformer.module import MegatronModule

from megavlm.config.schema import ModelConfig, ParallelConfig, StageConfig
from megavlm.config.vision import ROTARY_POSITIONS
from megavlm.data.types import PackedBatch
from megavlm.models.vision.features import Collect
from megavlm.parallel.context import ParallelContext, whole_on_every_tensor_rank
from megavlm.parallel.encoder_layout import RowLayout, gather_rows, shared_gradient
from megavlm.planner.pictures import Picture, PictureDeal, PictureDealer

Module = TypeVar("Module", bound=MegatronModule)
Item = TypeVar("Item")


class Pixels(NamedTuple):
    """What encoder and projector take of a batch: all of its pictures, or those of this rank."""

    pixels: torch.Tensor
    """uint8: tiles (T, C, side, side), or pictures in their own size end to end (X,)."""
    grids: list[Any] | None
    """Second argument of the encoder: patches of pictures in their own size, or how pictures were cut into tiles that see each other."""
    instructions: tuple[torch.Tensor, list[int]] | None
    """`Features.instructions`."""


def build_in_layout(ranks: int, parallel: ParallelConfig, ctx: ParallelContext, build: Callable[[ParallelConfig], Module]) -> Module:
    """`build(parallel)` for so many tensor ranks: those of the grid, or 1, which makes the module whole on each of them."""
    if ranks == ctx.grid.tensor:
        return build(parallel)
    with whole_on_every_tensor_rank(ctx):
        module = build(parallel.model_copy(update={"tensor": ranks, "sequence": False}))
    for parameter in module.parameters():
        # Copies: megatron-core would count each in the gradient norm.
        parameter.tensor_model_parallel = False
    return module


class DealtPictures:
    """Deals the pictures of microbatches to the ranks that share them."""

    def __init__(
        self, model: ModelConfig, parallel: ParallelConfig, ctx: ParallelContext, dtype: torch.dtype, stage: StageConfig | None = None
    ) -> None:
        dealer = PictureDealer.of(model, parallel, dtype.itemsize, stage)
        assert dealer is not None, "the recipe deals no pictures"
        self.dealer = dealer
        self.model, self.ctx = model, ctx
        self.number = ctx.context_rank * ctx.grid.tensor + ctx.tensor_rank

    def deal(self, batch: PackedBatch) -> PictureDeal | None:
        """Of a batch with pictures; None where every rank encodes all."""
        tiles = [picture.tiles for picture in batch.picture_tiles] if batch.picture_tiles is not None else None
        return self.dealer.deal(batch.num_tiles, batch.tile_grids, tiles)

    def keep_own(self, batch: PackedBatch) -> PackedBatch:
        """The batch with the pixels and instructions of this rank's pictures alone, if they are dealt at all."""
        deal = self.deal(batch) if batch.num_tiles and batch.own_pictures is None else None
        return batch if deal is None else keep_pictures(batch, deal.pictures, deal.shares[self.number])

    def own(self, batch: PackedBatch) -> tuple[Pixels, Collect]:
        """(what this rank encodes; how its projected rows become those of all pictures)."""
        by_picture, deal = self.model.vision.canvas is not None, self.deal(batch)
        if deal is None:
            return pixels_of(batch, by_picture=by_picture), lambda rows: shared_gradient(rows, self.ctx)
        layout = RowLayout.of(deal.first_rows, deal.shares, self.ctx)
        if not deal.shares[self.number]:
            return grey_picture(self.model, self.ctx.device), lambda rows: gather_rows(rows[:0], layout)
        return pixels_of(self.keep_own(batch), by_picture=by_picture), lambda rows: gather_rows(rows, layout)


def keep_pictures(batch: PackedBatch, pictures: Sequence[Picture], kept: tuple[int, ...]) -> PackedBatch:
    """The batch with the pixels and instructions of the pictures `kept` (numbers, ascending) alone."""
    parts: dict[str, torch.Tensor | None] = {}
    for name, sizes in (
        ("tiles_TCHW", [picture.tiles for picture in pictures]),
        ("pixels_X", _pixel_counts(batch, pictures)),
        ("instruction_ids_W", batch.instruction_lengths),
    ):
        tensor = getattr(batch, name)
        if tensor is not None and sizes is not None:
            runs = tensor.split(list(sizes))
            parts[name] = torch.cat([runs[i] for i in kept]) if kept else tensor[:0]
    return replace(batch, own_pictures=kept, **parts)  # type: ignore[arg-type]


def _pixel_counts(batch: PackedBatch, pictures: Sequence[Picture]) -> list[int] | None:
    """Values of each picture in its own size."""
    if batch.pixels_X is None:
        return None
    patches = sum(picture.work.patches for picture in pictures)
    per_patch, rest = divmod(batch.pixels_X.numel(), patches)
    if rest:
        raise ValueError(
            f"{batch.pixels_X.numel()} pixel values do not make {patches} patches: the data were prepared for another model.vision"
        )
    return [picture.work.patches * per_patch for picture in pictures]


def pixels_of(batch: PackedBatch, *, by_picture: bool) -> Pixels:
    """The pictures whose pixels are here; `by_picture`: with how each was cut into tiles."""

    def here(of_all: Sequence[Item] | None) -> list[Item] | None:
        return None if of_all is None else list(of_all) if batch.own_pictures is None else [of_all[i] for i in batch.own_pictures]

    pixels = batch.pixels_X if batch.tile_grids is not None else batch.tiles_TCHW
    assert pixels is not None, "the first pipeline stage needs the pixels of its batch"
    grids = here(batch.picture_tiles) if by_picture else here(batch.tile_grids)
    lengths = here(batch.instruction_lengths)
    return Pixels(pixels, grids, None if batch.instruction_ids_W is None or lengths is None else (batch.instruction_ids_W, lengths))


def grey_picture(model: ModelConfig, device: torch.device) -> Pixels:
    """The cheapest picture that runs every layer."""
    vision, block_px = model.vision, model.vision.patch_size_px * model.projector.pixel_shuffle
    # Encoders with rotary positions take pictures of any size: the smallest will do.
    side = block_px if vision.positions in ROTARY_POSITIONS else vision.image_size_px
    tile = torch.full((1, vision.num_channels, side, side), 127, dtype=torch.uint8, device=device)
    reads = model.projector.qformer is not None and model.projector.qformer.instruction is not None
    return Pixels(tile, None, (torch.zeros(1, dtype=torch.int64, device=device), [1]) if reads else None)
