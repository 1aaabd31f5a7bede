"""From a pack's plan to its tensors: read, decode, resize, tokenise, mask. A pure function of (plan, shards), on any rank.

Which pictures are readable decides loss weights, so every rank that computes a loss must know it. A rank decodes when it has
the encoder (`needs_tiles`) or when it is told to check (`check_images`, the default); only a pipeline stage that neither
encodes nor computes a loss may switch the check off. All ranks use the same decoder, hence agree.

Shape legend: L tokens of a sample, P patches of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, Recipe, StageConfig
from megavlm.data.chat import Chat
from megavlm.data.collate import Piece, collate
from megavlm.data.decode import ImageDecoder, make_decoder
from megavlm.data.images import ImageError
from megavlm.data.index import SampleIndex
from megavlm.data.instructions import instruction_tokenizer
from megavlm.data.loss_weights import target_weights
from megavlm.data.resizing import PictureGrid, make_resizing
from megavlm.data.sample import Sample
from megavlm.data.token_table import text_hash
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.types import PackedBatch, PackPlan, SampleRef
from megavlm.planner.flops import VisionWork


class MaterialiseError(ValueError):
    """A plan that does not fit the data: the shards changed since they were indexed, or a label is out of range."""


class Materialiser:
    """Turns PackPlans into PackedBatches for one stage. Thread-safe.

    A target's loss weight is its sample's `weight` x data.sources.*.loss_weight x stage.loss.task_weights x what
    stage.loss.averaging makes of the sample's number of targets; 0 where a picture of the sample cannot be read.

    Args:
        recipe, stage: the run and the stage whose objective decides the layout.
        indexes: SampleIndex per source name.
        tokenizer: the recipe's.
        needs_tiles: whether this rank holds the vision encoder and wants pixels.
        check_images: decode (and throw away) pictures even without `needs_tiles`, to know which are readable.
        device: where nvImageCodec may decode with data.image.decoder=auto; tensors are always on the CPU.

    Raises:
        MaterialiseError: a label of the data does not fit stage.num_classes.
    """

    def __init__(
        self,
        recipe: Recipe,
        stage: StageConfig,
        indexes: Mapping[str, SampleIndex],
        tokenizer: Tokenizer,
        *,
        needs_tiles: bool,
        check_images: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        self.recipe, self.stage, self.indexes, self.tokenizer = recipe, stage, indexes, tokenizer
        self.needs_tiles, self.check_images = needs_tiles, check_images
        self.classifies = stage.objective == "vision_classification"
        self.chat = Chat(recipe.data.chat_template, tokenizer, recipe.data.image.marks)
        image = ImageConfig() if self.classifies else recipe.data.image
        self.resizing = make_resizing(image, recipe.model, tokenizer)
        self.instructions = None if self.classifies or not needs_tiles else instruction_tokenizer(recipe.data, recipe.model)
        self.decoder: ImageDecoder = make_decoder(recipe.data.image.decoder, device)
        for name, index in indexes.items():
            if stage.num_classes is not None and index.max_label > stage.num_classes - 2:
                raise MaterialiseError(
                    f"source {name!r} has labels up to {index.max_label}, but stage {stage.name!r} has num_classes="
                    f"{stage.num_classes}, whose last is the background: set num_classes={index.max_label + 2}"
                )

    def __call__(self, packs: Sequence[PackPlan], at_sample: Callable[[SampleRef], None] | None = None) -> PackedBatch:
        """The microbatch of `packs`, each padded to data.seq_len_tokens (vision_classification: not padded), one after another.

        Unreadable pictures become grey, their sample's weights 0; `metadata["bad_samples"]` lists source, key, row and reason.

        Args:
            at_sample: called with each sample before its work begins.

        Raises:
            MaterialiseError: a sample differs from its index row.
        """
        pieces: list[Piece | int] = []
        for pack in packs:
            ours = []
            for ref, length in zip(pack.samples, pack.lengths_tokens, strict=True):
                if at_sample is not None:
                    at_sample(ref)
                ours.append(self._piece(ref, length))
            self._check_vision(pack, ours)
            pieces += ours
            if not self.classifies:
                used = sum(len(p.ids_L) for p in ours)
                if used > self.recipe.data.seq_len_tokens:
                    raise MaterialiseError(f"a pack holds {used} tokens, more than data.seq_len_tokens={self.recipe.data.seq_len_tokens}")
                if used < self.recipe.data.seq_len_tokens:
                    pieces.append(self.recipe.data.seq_len_tokens - used)
        return collate(pieces, self.tokenizer.pad_id, self.recipe.model.visual_tokens_per_tile, self.resizing.native)

    def _check_vision(self, pack: PackPlan, pieces: Sequence[Piece]) -> None:
        work = VisionWork.total(g.work for p in pieces for g in p.grids)
        if work != pack.vision._replace(looks=0):
            where = self.indexes[pack.samples[0].source].where(pack.samples[0].row)
            raise MaterialiseError(
                f"the pack that begins with {where} has pictures of {work}, the plan says {pack.vision}: it was made for another index"
            )

    def _piece(self, ref: SampleRef, planned_length: int) -> Piece:
        index = self.indexes[ref.source]
        sample = index.sample(ref.row)
        grids = index.grids(ref.row)
        if self.classifies:
            size, patch = self.recipe.model.vision.image_size_px, self.recipe.model.vision.patch_size_px
            targets = patch_labels(sample, size, patch, background=int(self.stage.num_classes or 0) - 1)
            ids = np.zeros(len(targets), dtype=np.int64)
            rows = image_rows = np.arange(len(targets))
        else:
            encoded = self.chat.encode_conversation([m.model_dump() for m in sample.messages], [self.resizing.sequence(g) for g in grids])
            ids = encoded.ids_L
            if len(ids) != planned_length:
                raise MaterialiseError(
                    f"{index.where(ref.row)} has {len(ids)} tokens, the plan says {planned_length}: the shards changed since"
                )
            if text_hash(encoded.plain_ids, encoded.plain_supervised) != int(index.ids_hash[ref.row]):
                raise MaterialiseError(
                    f"{index.where(ref.row)} has another text than when it was indexed, as long in tokens: the shards changed since,"
                    f" with their sizes and times as before. Touch the shards, so that they are indexed again"
                )
            rows = np.flatnonzero(encoded.supervised_L) - 1
            targets = ids[rows + 1]
            image_rows = np.flatnonzero(ids == self.tokenizer.image_token_id)
        feature_rows = [self.resizing.feature_rows(g, i.width, i.height) for g, i in zip(grids, sample.images, strict=True)]
        if any(own is not None and len(own) != g.tokens for own, g in zip(feature_rows, grids, strict=True)):
            raise MaterialiseError(f"{index.where(ref.row)} has pictures of other sizes than when it was indexed: the shards changed since")
        pixels, problem = self._pixels(index, ref.row, sample, grids)
        return Piece(
            ref=ref,
            key=index.key(ref.row),
            task=sample.task,
            ids_L=ids,
            target_rows_Q=rows,
            target_ids_Q=targets,
            weight=0.0 if problem is not None else self._target_weight(ref.source, sample, len(targets)),
            image_rows_N=image_rows,
            grids=grids,
            feature_rows=feature_rows,
            pixels=pixels,
            instructions=self.instructions([m.model_dump() for m in sample.messages]) if self.instructions is not None else [],
            problem=problem,
        )

    def _target_weight(self, source: str, sample: Sample, num_targets: int) -> float:
        loss = self.stage.loss
        source_weight = self.recipe.data.sources[source].loss_weight
        return target_weights(num_targets, sample.weight, source_weight, loss.task_weights.get(sample.task, 1.0), loss.averaging)

    def _pixels(self, index: SampleIndex, row: int, sample: Sample, grids: list[PictureGrid]) -> tuple[list[torch.Tensor], str | None]:
        """uint8 pixels of each picture (empty without `needs_tiles`), and why one of them could not be read."""
        if not grids or not (self.needs_tiles or self.check_images):
            return [], None
        cut: list[torch.Tensor] = []
        for number, (entry, grid) in enumerate(zip(sample.images, grids, strict=True)):
            try:
                picture = self.decoder.decode(index.image(row, number))
                height, width = picture.shape[:2]
                if (width, height) != (entry.width, entry.height):
                    raise ImageError(f"it is {width}x{height} pixels, its metadata say {entry.width}x{entry.height}")
                if self.needs_tiles:
                    cut.append(self.resizing.cut(picture, grid))
            except ImageError as error:
                grey = [self.resizing.grey(g) for g in grids] if self.needs_tiles else []
                return grey, f"{entry.file}: {error}"
        return cut, None


def patch_labels(sample: Sample, tile_px: int, patch_px: int, background: int) -> np.ndarray:
    """Class of each patch of a one-tile picture, int64 (P,), row by row.

    A patch belongs to the object whose box (scaled with the picture) contains the patch's centre, to the smallest where several
    do; to `background` where none does.
    """
    side = tile_px // patch_px
    centre = (np.arange(side) + 0.5) * patch_px
    labels = np.full((side, side), background, dtype=np.int64)
    picture = sample.images[0]
    boxes = [((o.box_px[2] - o.box_px[0]) * (o.box_px[3] - o.box_px[1]), o) for o in sample.objects or []]
    for _, thing in sorted(boxes, key=lambda b: b[0], reverse=True):
        x0, y0, x1, y1 = thing.box_px
        columns = (centre >= x0 * tile_px / picture.width) & (centre < x1 * tile_px / picture.width)
        lines = (centre >= y0 * tile_px / picture.height) & (centre < y1 * tile_px / picture.height)
        labels[np.ix_(lines, columns)] = thing.label
    return labels.ravel()
