"""Tiny models and batches for tests: large weights and several samples in a pack, so that position and mask mistakes show.

Shape legend: S packed sequence, Q targets, T tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megavlm.config.schema import LanguageConfig, ModelConfig, ParallelConfig, PrecisionConfig, ProjectorConfig, VisionConfig
from megavlm.data.types import PackedBatch, SampleRef
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import ParallelContext

IMAGE_TOKEN_ID = 3


def tiny_model_config(*, tie_embeddings: bool = False, siglip: bool = False, init_std: float = 0.2, **language: Any) -> ModelConfig:
    """A model of some ten thousand weights: 16-pixel tiles of 16 patches, 3 encoder layers of which 2 run, 4 LLM layers.

    `siglip` gives the SigLIP style (no class token, biased patches, pooling head); `language` overrides fields of its block.
    """
    vision: dict[str, Any] = {
        "image_size_px": 16,
        "patch_size_px": 4,
        "num_layers": 3,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
    }
    if siglip:
        vision |= {"class_token": False, "pre_norm": False, "patch_bias": True, "pooling_head": True, "activation": "gelu_tanh"}
    text: dict[str, Any] = {
        "vocab_size": 101,
        "num_layers": 4,
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "tie_embeddings": tie_embeddings,
    }
    return ModelConfig(
        init_std=init_std, vision=VisionConfig(**vision), projector=ProjectorConfig(), language=LanguageConfig(**(text | language))
    )


def tiny_chunks(
    model: ModelConfig,
    ctx: ParallelContext,
    parallel: ParallelConfig | None = None,
    *,
    dtype: str = "fp32",
    text_only: bool = False,
) -> list[torch.nn.Module]:
    """The model's chunks on this rank, with unset weights: initialise, import or load them."""
    parallel = parallel or ParallelConfig()
    precision = PrecisionConfig(dtype=dtype)
    return [VisionLanguageModel(model, precision, parallel, ctx, c, text_only=text_only) for c in range(parallel.virtual_pipeline)]


def tiny_batch(
    model: ModelConfig,
    *,
    seed: int = 0,
    images_per_sample: tuple[int, ...] = (1, 0, 2),
    text_tokens: tuple[int, ...] = (9, 14, 6),
    seq_len_tokens: int | None = None,
    num_targets: int = 9,
) -> PackedBatch:
    """A pack of several samples of unequal length and image count, and one padding segment up to `seq_len_tokens` when given.

    Each image stands behind the second token of its sample. Targets are drawn from the second half of each sample's text.
    """
    generator = torch.Generator().manual_seed(seed)
    per_image = model.visual_tokens_per_tile
    lengths: list[int] = []
    tokens: list[torch.Tensor] = []
    images: list[torch.Tensor] = []
    for num_images, num_text in zip(images_per_sample, text_tokens, strict=True):
        text = torch.randint(IMAGE_TOKEN_ID + 1, model.language.vocab_size, (num_text,), generator=generator)
        visual = torch.full((num_images * per_image,), IMAGE_TOKEN_ID)
        images.append(torch.arange(visual.numel()) + sum(lengths) + 2)
        tokens.append(torch.cat([text[:2], visual, text[2:]]))
        lengths.append(num_text + visual.numel())
    candidates = [
        end - k
        for end, num_text in zip(torch.tensor(lengths).cumsum(0).tolist(), text_tokens, strict=True)
        for k in range(2, num_text // 2 + 2)
    ]
    samples: list[SampleRef | None] = [SampleRef("tiny", i) for i in range(len(lengths))]
    tasks = ["tiny"] * len(lengths)
    padding = (seq_len_tokens or sum(lengths)) - sum(lengths)
    assert padding >= 0, f"seq_len_tokens={seq_len_tokens} is less than the samples' {sum(lengths)} tokens"
    if padding:
        tokens.append(torch.zeros(padding, dtype=torch.int64))
        lengths, samples, tasks = [*lengths, padding], [*samples, None], [*tasks, ""]
    tokens_S = torch.cat(tokens)
    chosen = torch.randperm(len(candidates), generator=generator)[: min(num_targets, len(candidates))]
    positions_Q = torch.tensor(sorted(candidates[i] for i in chosen.tolist()), dtype=torch.int64)
    num_tiles = sum(images_per_sample)
    side = model.vision.image_size_px
    bounds = torch.tensor(lengths).cumsum(0)
    return PackedBatch(
        tokens_S=tokens_S,
        positions_S=torch.cat([torch.arange(n) for n in lengths]),
        segment_lengths=lengths,
        segment_samples=samples,
        segment_tasks=tasks,
        target_positions_Q=positions_Q,
        target_ids_Q=tokens_S[positions_Q + 1],
        target_weights_Q=torch.ones(positions_Q.numel()),
        target_segments_Q=torch.searchsorted(bounds, positions_Q, right=True),
        image_positions_N=torch.cat(images),
        num_tiles=num_tiles,
        tiles_TCHW=torch.randint(0, 256, (num_tiles, 3, side, side), generator=generator, dtype=torch.uint8) if num_tiles else None,
    )


def tiny_native_batch(model: ModelConfig, grids: Sequence[Sequence[tuple[int, int]]], *, seed: int = 0, **options: Any) -> PackedBatch:
    """As `tiny_batch`, with pictures in their own size: (rows, columns) of patches of each picture of each sample.

    The patches of a sample must be a multiple of a tile's. `options` are those of `tiny_batch`.
    """
    per_tile = model.vision.num_patches
    counts = [sum(rows * columns for rows, columns in sample) for sample in grids]
    assert all(count % per_tile == 0 for count in counts), f"{counts} patches are no multiples of {per_tile}"
    batch = tiny_batch(model, seed=seed, images_per_sample=tuple(count // per_tile for count in counts), **options)
    every = [grid for sample in grids for grid in sample]
    num_values = model.vision.num_channels * model.vision.patch_size_px**2 * sum(counts)
    pixels = torch.randint(0, 256, (num_values,), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return replace(batch, num_tiles=len(every), tiles_TCHW=None, pixels_X=pixels if every else None, tile_grids=every)
