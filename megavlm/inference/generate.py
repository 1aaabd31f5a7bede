"""Generation: prompts (token ids with expanded placeholders, image tiles) in, token ids out.

All prompts of a call run together: one packed forward pass over the prompts, then one token per sequence a step until each
has met a stop token or its limit. Works on any tensor-parallel size; the model must be one pipeline stage.

Shape legend: L tokens of a prompt, T tiles, C channels, B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megavlm.data.types import PackedBatch, SampleRef
from megavlm.inference.cache import KVCache
from megavlm.inference.sampling import GenerationError, Sampler, Sampling
from megavlm.models.vlm import VisionLanguageModel

OnToken = Callable[[int, int], None]
"""Called with (number of the prompt, token id) for each new token, in order."""


class PromptError(GenerationError):
    """A prompt that the model cannot take."""


@dataclass(frozen=True)
class Prompt:
    """What one sequence starts from."""

    ids: Sequence[int]
    """Token ids; each picture's placeholder stands there once per visual token (`Chat.encode_prompt` does this)."""
    tiles_TCHW: torch.Tensor | None = None
    """uint8 tiles of all pictures of the prompt, in order; None: no picture."""


@torch.no_grad()
def generate(
    model: VisionLanguageModel,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    image_token_id: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """New token ids of each prompt. An answer that ended by itself has its stop token as last id; others hit `max_new_tokens`.

    Every tensor rank calls this with the same arguments and gets the same answer. Greedy at temperature 0; see `Sampling`.

    Raises:
        PromptError: an empty prompt, placeholders and tiles that do not match, more tokens than the model has positions for.
        GenerationError: a model split over pipeline or context ranks or with sequence parallelism; a sampling value out of range.
    """
    _check_model(model)
    if max_new_tokens < 1:
        raise GenerationError(f"max_new_tokens={max_new_tokens} must be at least 1")
    if not prompts:
        return []
    for i, prompt in enumerate(prompts):
        _check_prompt(model, i, prompt, max_new_tokens, image_token_id)
    sampler, cache, stops = Sampler(Sampling(temperature, top_k, top_p, seed)), KVCache(), set(stop_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    with _evaluating(model):
        batch = prompt_batch(prompts, image_token_id).to(model.ctx.device)
        while True:
            logits_BV = _last_logits(model, batch, cache)
            tokens = _agree(model, sampler.next_tokens(logits_BV, running)).tolist()
            for sequence, token in zip(running, tokens, strict=True):
                answers[sequence].append(token)
                if on_token is not None:
                    on_token(sequence, token)
            keep = [b for b, (s, t) in enumerate(zip(running, tokens, strict=True)) if t not in stops and len(answers[s]) < max_new_tokens]
            if not keep:
                return answers
            if len(keep) < len(running):
                cache.drop(keep)
                running = [running[b] for b in keep]
            batch = _token_batch([tokens[b] for b in keep], cache.lengths).to(model.ctx.device)


def prompt_batch(prompts: Sequence[Prompt], image_token_id: int) -> PackedBatch:
    """All prompts end to end in one `PackedBatch` without targets; what generation and logit comparisons feed the model."""
    ids = [torch.as_tensor(list(p.ids), dtype=torch.int64) for p in prompts]
    tiles = [p.tiles_TCHW for p in prompts if p.tiles_TCHW is not None and len(p.tiles_TCHW)]
    tokens_S = torch.cat(ids)
    positions_S = torch.cat([torch.arange(len(i)) for i in ids])
    images_N = torch.nonzero(tokens_S == image_token_id).squeeze(1)
    tiles_TCHW = torch.cat(tiles) if tiles else None
    return _batch(tokens_S, positions_S, [len(i) for i in ids], images_N, tiles_TCHW)


def _token_batch(tokens: list[int], positions: list[int]) -> PackedBatch:
    """One token of each sequence."""
    return _batch(torch.tensor(tokens), torch.tensor(positions), [1] * len(tokens), torch.empty(0, dtype=torch.int64), None)


def _batch(
    tokens_S: torch.Tensor, positions_S: torch.Tensor, lengths: list[int], images_N: torch.Tensor, tiles_TCHW: torch.Tensor | None
) -> PackedBatch:
    none = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        tokens_S=tokens_S,
        positions_S=positions_S,
        segment_lengths=lengths,
        segment_samples=[SampleRef("prompt", i) for i in range(len(lengths))],
        segment_tasks=[""] * len(lengths),
        target_positions_Q=none,
        target_ids_Q=none,
        target_weights_Q=torch.empty(0),
        target_segments_Q=none,
        image_positions_N=images_N,
        num_tiles=0 if tiles_TCHW is None else len(tiles_TCHW),
        tiles_TCHW=tiles_TCHW,
    )


def _last_logits(model: VisionLanguageModel, batch: PackedBatch, cache: KVCache) -> torch.Tensor:
    """Logits (B, V) that follow each sequence."""
    cache.begin(batch.segment_lengths, batch.tokens_S.device)
    packing = model.packing(batch)
    packing.cache = cache
    hidden = model.transform(batch, packing)
    assert packing.cu_seqlens_q is not None
    return model.language.logits(hidden, packing.cu_seqlens_q[1:].long() - 1)


def _agree(model: VisionLanguageModel, tokens_B: torch.Tensor) -> torch.Tensor:
    """Tensor rank 0's choice on all tensor ranks: ranks that disagreed about a stop token would wait for each other for ever."""
    if model.ctx.grid.tensor > 1:
        dist.broadcast(tokens_B, dist.get_global_rank(model.ctx.tensor_group, 0), group=model.ctx.tensor_group)
    return tokens_B


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, and back to what was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_model(model: VisionLanguageModel) -> None:
    grid = model.ctx.grid
    if grid.pipeline > 1 or grid.context > 1 or model.config.sequence_parallel:
        raise GenerationError(
            f"generation needs pipeline=1, context=1 and sequence=false, and this model has pipeline={grid.pipeline}, "
            f"context={grid.context}, sequence={str(model.config.sequence_parallel).lower()}: load it with "
            "megavlm.inference.load_for_inference, which loads any checkpoint into such a layout"
        )


def _check_prompt(model: VisionLanguageModel, number: int, prompt: Prompt, max_new_tokens: int, image_token_id: int) -> None:
    length, limit = len(prompt.ids), model.model.language.max_positions
    if length == 0:
        raise PromptError(f"prompt {number} is empty: give at least one token")
    if length + max_new_tokens > limit:
        raise PromptError(
            f"prompt {number} has {length} tokens (visual tokens included) and max_new_tokens={max_new_tokens} may follow: "
            f"together {length + max_new_tokens}, but model.language.max_positions={limit}"
        )
    highest = max(prompt.ids)
    if min(prompt.ids) < 0 or highest >= model.model.language.vocab_size:
        raise PromptError(
            f"prompt {number} holds token ids from {min(prompt.ids)} to {highest}, but the model's vocabulary has "
            f"{model.model.language.vocab_size} rows: is this the model's tokenizer?"
        )
    tiles, per_tile = prompt.tiles_TCHW, model.model.visual_tokens_per_tile
    placeholders = sum(1 for i in prompt.ids if i == image_token_id)
    num_tiles = 0 if tiles is None else len(tiles)
    if placeholders != num_tiles * per_tile:
        raise PromptError(
            f"prompt {number} has {placeholders} image placeholders (id {image_token_id}), but {num_tiles} tiles x {per_tile} visual "
            f"tokens = {num_tiles * per_tile}"
        )
    side, channels = model.model.vision.image_size_px, model.model.vision.num_channels
    if tiles is not None and num_tiles and (tiles.dtype != torch.uint8 or tuple(tiles.shape[1:]) != (channels, side, side)):
        raise PromptError(
            f"prompt {number}: tiles are {tiles.dtype} of shape {tuple(tiles.shape)}, "
            f"the encoder takes uint8 (T, {channels}, {side}, {side})"
        )
