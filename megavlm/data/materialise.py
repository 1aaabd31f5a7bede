"""From a pack's plan to its tensors: read, decode, tile, tokenise, mask. A pure function of (plan, shards), on any rank.

Which pictures are readable decides loss weights, so every rank that computes a loss must know it. A rank decodes when it has
the encoder (`needs_tiles`) or when it is told to check (`check_images`, the default); only a pipeline stage that neither
encodes nor computes a loss may switch the check off. All ranks use the same decoder, hence agree.

Shape legend: S packed sequence, T tiles, P patches of a tile, Q targets, N visual tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megavlm.config.schema import ImageConfig, Recipe, StageConfig
from megavlm.data.chat import Chat
from megavlm.data.decode import ImageDecoder, make_decoder
from megavlm.data.images import ImageError
from megavlm.data.index import SampleIndex, sample_grids
from megavlm.data.resizing import PictureGrid, make_resizing
from megavlm.data.shards import Sample
from megavlm.data.tokenizer import Tokenizer
from megavlm.data.types import PackedBatch, PackPlan, SampleRef


class MaterialiseError(ValueError):
    """A plan that does not fit the data: the shards changed since they were indexed, or a label is out of range."""


@dataclass
class _Piece:
    """One sample as arrays. Shape legend: L its rows."""

    ref: SampleRef
    task: str
    ids_L: np.ndarray
    target_rows: np.ndarray
    """Rows (from 0) whose hidden state predicts target_ids."""
    target_ids: np.ndarray
    image_rows: np.ndarray
    weight: float
    num_tiles: int
    tiles: torch.Tensor | None
    problem: str | None
    key: str


class Materialiser:
    """Turns PackPlans into PackedBatches for one stage. Thread-safe.

    Args:
        recipe, stage: the run and the stage whose objective decides the layout.
        indexes: SampleIndex per source name.
        tokenizer: the recipe's.
        needs_tiles: whether this rank holds the vision encoder and wants `tiles_TCHW`.
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
        self.chat = Chat(recipe.data.chat_template, tokenizer)
        image = ImageConfig() if stage.objective == "vision_classification" else recipe.data.image
        self.resizing = make_resizing(image, recipe.model)
        self.decoder: ImageDecoder = make_decoder(recipe.data.image.decoder, device)
        for name, index in indexes.items():
            if stage.num_classes is not None and index.max_label > stage.num_classes - 2:
                raise MaterialiseError(
                    f"source {name!r} has labels up to {index.max_label}, but stage {stage.name!r} has num_classes="
                    f"{stage.num_classes}, whose last is the background: set num_classes={index.max_label + 2}"
                )

    def __call__(self, packs: Sequence[PackPlan]) -> PackedBatch:
        """The microbatch of `packs`, each padded to data.seq_len_tokens (vision_classification: not padded), one after another.

        Unreadable pictures become grey tiles, their sample's weights 0; `metadata["bad_samples"]` lists source, key and reason.

        Raises:
            MaterialiseError: a sample differs from its index row.
        """
        pieces: list[_Piece | int] = []
        for pack in packs:
            ours = [self._piece(ref, length) for ref, length in zip(pack.samples, pack.lengths_tokens, strict=True)]
            pieces += ours
            if self.stage.objective != "vision_classification":
                used = sum(len(p.ids_L) for p in ours)
                if used > self.recipe.data.seq_len_tokens:
                    raise MaterialiseError(f"a pack holds {used} tokens, more than data.seq_len_tokens={self.recipe.data.seq_len_tokens}")
                if used < self.recipe.data.seq_len_tokens:
                    pieces.append(self.recipe.data.seq_len_tokens - used)
        return self._join(pieces)

    # ------------------------------------------------------------------------------------------------- one sample

    def _piece(self, ref: SampleRef, planned_length: int) -> _Piece:
        index = self.indexes[ref.source]
        sample = index.sample(ref.row)
        grids = sample_grids(sample, self.recipe.data, self.recipe.model, self.stage.objective)
        if self.stage.objective == "vision_classification":
            size, patch = self.recipe.model.vision.image_size_px, self.recipe.model.vision.patch_size_px
            labels = patch_labels(sample, size, patch, background=int(self.stage.num_classes or 0) - 1)
            ids = np.zeros(len(labels), dtype=np.int64)
            rows, targets, image_rows = np.arange(len(labels)), labels, np.arange(len(labels))
        else:
            encoded = self.chat.encode_conversation([m.model_dump() for m in sample.messages], [g.tokens for g in grids])
            ids = encoded.ids_L
            if len(ids) != planned_length:
                raise MaterialiseError(
                    f"{index.where(ref.row)} has {len(ids)} tokens, the plan says {planned_length}: the shards changed since"
                )
            rows = np.flatnonzero(encoded.supervised_L) - 1
            targets = ids[rows + 1]
            image_rows = np.flatnonzero(ids == self.tokenizer.image_token_id)
        tiles, problem = self._tiles(index, ref.row, sample, grids)
        return _Piece(
            ref=ref,
            task=sample.task,
            ids_L=ids,
            target_rows=rows,
            target_ids=targets,
            image_rows=image_rows,
            weight=0.0 if problem is not None else sample.weight,
            num_tiles=sum(g.work.tiles for g in grids),
            tiles=tiles,
            problem=problem,
            key=index.key(ref.row),
        )

    def _tiles(self, index: SampleIndex, row: int, sample: Sample, grids: list[PictureGrid]) -> tuple[torch.Tensor | None, str | None]:
        if not grids or not (self.needs_tiles or self.check_images):
            return None, None
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
                tiles = torch.cat([self.resizing.grey(g) for g in grids]) if self.needs_tiles else None
                return tiles, f"{entry.file}: {error}"
        return (torch.cat(cut) if cut else None), None

    # ------------------------------------------------------------------------------------------------- many samples

    def _join(self, pieces: Sequence[_Piece | int]) -> PackedBatch:
        samples = [p for p in pieces if isinstance(p, _Piece)]
        lengths = [len(p.ids_L) if isinstance(p, _Piece) else p for p in pieces]
        starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = [(int(starts[i]), i, p) for i, p in enumerate(pieces) if isinstance(p, _Piece)]
        pad = self.tokenizer.pad_id
        tiles = [p.tiles for p in samples if p.tiles is not None] if self.needs_tiles else []
        bad = [{"source": p.ref.source, "key": p.key, "row": p.ref.row, "reason": p.problem} for p in samples if p.problem is not None]
        return PackedBatch(
            tokens_S=_tensor([p.ids_L if isinstance(p, _Piece) else np.full(p, pad) for p in pieces]),
            positions_S=_tensor([np.arange(n) for n in lengths]),
            segment_lengths=lengths,
            segment_samples=[p.ref if isinstance(p, _Piece) else None for p in pieces],
            segment_tasks=[p.task if isinstance(p, _Piece) else "" for p in pieces],
            target_positions_Q=_tensor([p.target_rows + start for start, _, p in at]),
            target_ids_Q=_tensor([p.target_ids for p in samples]),
            target_weights_Q=_tensor([np.full(len(p.target_ids), p.weight, dtype=np.float32) for p in samples], torch.float32),
            target_segments_Q=_tensor([np.full(len(p.target_ids), i) for _, i, p in at]),
            image_positions_N=_tensor([p.image_rows + start for start, _, p in at]),
            num_tiles=sum(p.num_tiles for p in samples),
            tiles_TCHW=torch.cat(tiles) if tiles else None,
            num_bad_samples=len(bad),
            metadata={"bad_samples": bad, "num_samples": len(samples), "keys": [p.key for p in samples]},
        )


def _tensor(arrays: Sequence[np.ndarray], dtype: torch.dtype = torch.int64) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(arrays)).to(dtype) if arrays else torch.zeros(0, dtype=dtype)


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
