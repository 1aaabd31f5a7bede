"""Does a Hugging Face folder hold the model of a checkpoint? Tensor by tensor, and by the logits of both implementations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint import folders, store
from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import config_from_hf, quiet_transformers
from megavlm.checkpoint.hf.export import checkpoint_source, find_checkpoint, hf_tensors
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.data.types import PackedBatch, SampleRef
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import ParallelContext

TOLERANCE = 1e-4
"""Largest difference of fp32 logits, relative to the largest logit where that exceeds 1."""


@dataclass(frozen=True)
class Verification:
    """Outcome of `verify`; `asdict` of it is the written report."""

    checkpoint: str
    folder: str
    num_tensors: int
    unequal: list[str]
    """Tensors that differ, or that only one side has."""
    max_abs_logit_difference: float
    max_abs_logit: float
    tolerance: float
    ok: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def verify(run_or_checkpoint: str | Path, folder: str | Path, ctx: ParallelContext, *, seed: int = 0) -> Verification:
    """Compare every tensor bit by bit, and fp32 logits on a seeded pack of samples with no, one and two pictures.

    One rank; `ctx` is its grid of one. A difference is not an error: see `Verification.ok`.

    Raises:
        HuggingFaceError: the folder cannot be read, or holds a model of another shape.
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    checkpoint = find_checkpoint(run_or_checkpoint)
    model = config_from_hf(folder)
    _check_same_model(checkpoint, model)
    unequal, count = compare_tensors(checkpoint, folder, model)
    ours, theirs = logits_of_both(checkpoint, folder, model, ctx, seed)
    difference, largest = float((ours - theirs).abs().max()), float(theirs.abs().max())
    ok = not unequal and difference <= TOLERANCE * max(1.0, largest)
    return Verification(str(checkpoint), str(folder), count, unequal, difference, largest, TOLERANCE, ok)


def compare_tensors(checkpoint: Path, folder: str | Path, model: ModelConfig) -> tuple[list[str], int]:
    """(names that differ in any bit, format or shape or that one side lacks, number of names of both sides)."""
    unequal, seen = [], set()
    with WeightFolder(folder) as weights:
        for name, ours in hf_tensors(model, checkpoint_source(checkpoint)):
            seen.add(name)
            theirs = weights.tensor(name) if name in weights.names else None
            if theirs is None or theirs.dtype != ours.dtype or not torch.equal(theirs, ours):
                unequal.append(name)
        extra = weights.names - seen
    return sorted({*unequal, *extra}), len(seen | extra)


def logits_of_both(
    checkpoint: Path, folder: str | Path, model: ModelConfig, ctx: ParallelContext, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 logits (tokens, vocabulary) of one pack by our model, and of its samples one by one by Hugging Face's."""
    hf = quiet_transformers().LlavaForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32).eval()
    image_token = hf.config.image_token_index
    batch = _batch(model, image_token, seed)
    ours = VisionLanguageModel(model, PrecisionConfig(dtype="fp32"), ParallelConfig(), ctx)
    for module, where in store.module_folders(checkpoint).items():
        if getattr(ours, module, None) is not None:
            store.load(where, [ours], None, ctx, modules={module})
    with torch.no_grad():
        hidden = ours.eval().transform(batch, ours.packing(batch))
        return ours.language.logits(hidden), _hf_logits(hf, batch, model, image_token)


def _batch(model: ModelConfig, image_token: int, seed: int) -> PackedBatch:
    """Three samples of one pack, with no, one and two tiles."""
    generator = torch.Generator().manual_seed(seed)
    pieces, images, start = [], [], 0
    for num_tiles, num_text in ((0, 11), (1, 7), (2, 13)):
        text = torch.randint(0, model.language.vocab_size, (num_text,), generator=generator)
        text[text == image_token] = (image_token + 1) % model.language.vocab_size
        visual = torch.full((num_tiles * model.visual_tokens_per_tile,), image_token)
        images.append(torch.arange(visual.numel()) + start + 3)
        pieces.append(torch.cat([text[:3], visual, text[3:]]))
        start += pieces[-1].numel()
    none, side = torch.zeros(0, dtype=torch.int64), model.vision.image_size_px
    return PackedBatch(
        tokens_S=torch.cat(pieces),
        positions_S=torch.cat([torch.arange(p.numel()) for p in pieces]),
        segment_lengths=[p.numel() for p in pieces],
        segment_samples=[SampleRef("verify", i) for i in range(len(pieces))],
        segment_tasks=[""] * len(pieces),
        target_positions_Q=none,
        target_ids_Q=none,
        target_weights_Q=none.float(),
        target_segments_Q=none,
        image_positions_N=torch.cat(images),
        num_tiles=3,
        tiles_TCHW=torch.randint(0, 256, (3, model.vision.num_channels, side, side), generator=generator, dtype=torch.uint8),
    )


def _hf_logits(hf: Any, batch: PackedBatch, model: ModelConfig, image_token: int) -> torch.Tensor:
    assert batch.tiles_TCHW is not None
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (model.vision.image_mean, model.vision.image_std))
    pixels = (batch.tiles_TCHW.float() / 255 - mean) / std
    out, tile = [], 0
    for ids in torch.split(batch.tokens_S, batch.segment_lengths):
        tiles = int((ids == image_token).sum()) // model.visual_tokens_per_tile
        out.append(hf(input_ids=ids[None], pixel_values=pixels[tile : tile + tiles] if tiles else None).logits[0])
        tile += tiles
    return torch.cat(out)


def _check_same_model(checkpoint: Path, model: ModelConfig) -> None:
    """Everything of the model block that shapes the network must agree."""
    stored = folders.read_state(checkpoint).get("model")
    if stored is None:
        return
    ours = ModelConfig.model_validate(stored)
    ignored = {"init_from", "init_std"}
    here, there = (m.model_dump(exclude=ignored) for m in (ours, model))
    differing = [
        f"model.{block}.{field}: {here[block][field]!r} in the checkpoint, {there[block][field]!r} in the folder"
        for block in ("vision", "projector", "language")
        for field in here[block]
        if here[block][field] != there[block][field] and not _same(ours, block, field, there[block][field])
    ]
    if differing:
        raise HuggingFaceError(f"{checkpoint} and the folder hold different models: " + "; ".join(differing))


def _same(ours: ModelConfig, block: str, field: str, there: Any) -> bool:
    """None stands for a value that follows from others."""
    defaults = {
        ("language", "num_query_groups"): ours.language.kv_heads,
        ("language", "head_dim"): ours.language.head_width,
        ("projector", "hidden_size"): ours.language.hidden_size,
    }
    return (block, field) in defaults and there in (None, defaults[block, field])
