"""Generation: prompts (token ids with expanded placeholders, pixels) in, token ids out.

All prompts of a call run together: one packed forward pass over the prompts, then one token per sequence a step until each
has met a stop token or its limit. Works on any tensor-parallel size; the model must be one pipeline stage.

Shape legend: L tokens of a prompt, T tiles, C channels, X pixels of all pictures, N visual tokens, B sequences, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.distributed as dist

from megavlm.config.schema import LanguageConfig, ModelConfig
from megavlm.data.blends import rows_and_weights
from megavlm.data.prompt import Prompt, prompt_batch, token_batch
from megavlm.data.types import PackedBatch
from megavlm.inference.cache import KVCache
from megavlm.inference.linear import light_linears
from megavlm.inference.sampling import GenerationError, Sampler, Sampling
from megavlm.models.language.cross import Sight
from megavlm.models.language.mrope import position_shift
from megavlm.models.vlm import VisionLanguageModel

OnToken = Callable[[int, int], None]
"""Called with (number of the prompt, token id) for each new token, in order."""

IsOver = Callable[[int, Sequence[int]], bool]
"""Called with (number of the prompt, its new token ids so far) after each token; True ends that answer."""


class PromptError(GenerationError):
    """A prompt that the model cannot take."""


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
    first_number: int = 0,
    repetition_penalty: float = 1.0,
    is_over: IsOver | None = None,
    on_token: OnToken | None = None,
) -> list[list[int]]:
    """New token ids of each prompt. An answer that ended by itself has its stop token as last id; others hit `max_new_tokens`, or
    `is_over` ended them (stop strings: `megavlm.inference.stop.StopStrings`).

    Every tensor rank calls this with the same arguments and gets the same answer. Greedy at temperature 0; see `Sampling`. What a prompt
    draws depends on `seed` and its number; the first has `first_number`, so that a list in several batches draws as it would in one.

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
    sampler, cache, stops = Sampler(Sampling(temperature, top_k, top_p, seed, repetition_penalty)), KVCache(), set(stop_ids)
    for i, prompt in enumerate(prompts):
        sampler.start(first_number + i, prompt.ids)
    answers: list[list[int]] = [[] for _ in prompts]
    running, shifts = list(range(len(prompts))), [_shift(model.model, prompt) for prompt in prompts]
    with _evaluating(model), light_linears(model):
        batch = prompt_batch(prompts, image_token_id, model.model).to(model.ctx.device)
        while True:
            # Not for the prompts: what is computed for pictures may be kept, and training could not use it then.
            with torch.inference_mode(bool(cache.lengths)):
                logits_BV = _last_logits(model, batch, cache)
            tokens = _agree(model, sampler.next_tokens(logits_BV, [first_number + s for s in running])).tolist()
            for sequence, token in zip(running, tokens, strict=True):
                answers[sequence].append(token)
                if on_token is not None:
                    on_token(sequence, token)
            keep = [
                b
                for b, (s, t) in enumerate(zip(running, tokens, strict=True))
                if t not in stops and len(answers[s]) < max_new_tokens and not (is_over is not None and is_over(s, answers[s]))
            ]
            if not keep:
                return answers
            if len(keep) < len(running):
                cache.drop(keep)
                running = [running[b] for b in keep]
            if _rotates_anew(model.model.language, cache.lengths):
                cache = KVCache()
                whole = [replace(prompts[s], ids=[*prompts[s].ids, *answers[s]]) for s in running]
                batch = prompt_batch(whole, image_token_id, model.model).to(model.ctx.device)
            else:
                positions = [length + shifts[s] for length, s in zip(cache.lengths, running, strict=True)]
                batch = _token_batch([tokens[b] for b in keep], positions).to(model.ctx.device)


def _rotates_anew(language: LanguageConfig, lengths: Sequence[int]) -> bool:
    """Does a sequence's next token change the rotation of all its positions, and so its keys (LongRoPE; Phi3ForCausalLM does the same)?"""
    scaling = language.rope_scaling
    return scaling is not None and scaling.kind == "longrope" and scaling.parameters["original_max_position_embeddings"] in lengths


def _shift(model: ModelConfig, prompt: Prompt) -> int:
    """Position of the token behind a prompt, less the prompt's length: pictures take up fewer positions than tokens under M-RoPE."""
    if model.language.mrope_sections is None:
        return 0
    return position_shift(model.visual_grids(prompt.tile_grids, prompt.num_tiles))


def _token_batch(tokens: list[int], positions: list[int]) -> PackedBatch:
    """One token of each sequence."""
    return token_batch(torch.tensor(tokens), torch.tensor(positions), [1] * len(tokens))


def _last_logits(model: VisionLanguageModel, batch: PackedBatch, cache: KVCache) -> torch.Tensor:
    """Logits (B, V) that follow each sequence."""
    cache.begin(batch.segment_lengths, batch.tokens_S.device)
    packing = model.packing(batch)
    packing.cache = cache
    if packing.sight is not None:
        # After the prompts a token sees what the one before it saw.
        packing.sight = packing.sight if not cache.looks else Sight(tuple(cache.looks), tuple(cache.looks))
        cache.looks = list(packing.sight.last)
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
    if min(prompt.ids) < 0 or highest >= model.model.language.num_tokens:
        raise PromptError(
            f"prompt {number} holds token ids from {min(prompt.ids)} to {highest}, but the model's vocabulary has "
            f"{model.model.language.num_tokens} rows: is this the model's tokenizer?"
        )
    _check_pictures(model.model, number, prompt, image_token_id)


def _check_pictures(model: ModelConfig, number: int, prompt: Prompt, image_token_id: int) -> None:
    placeholders = sum(1 for i in prompt.ids if i == image_token_id)
    made, rows = prompt.num_feature_rows(model), prompt.feature_rows_N
    if placeholders != (prompt.num_placeholders(model) if rows is None else len(rows)):
        what = f"{prompt.num_tiles} pictures" if prompt.tile_grids is not None else f"{prompt.num_tiles} tiles"
        raise PromptError(
            f"prompt {number} has {placeholders} image placeholders (id {image_token_id}), but {what} make {made} visual tokens"
            + (f", of which {len(rows)} places are filled" if rows is not None else "")
        )
    if rows is not None and len(rows):
        rows, lowest = rows_and_weights(rows)[0], -1 if model.projector.image_newline else 0
        if int(rows.min()) < lowest or int(rows.max()) >= made:
            raise PromptError(
                f"prompt {number}: feature rows from {int(rows.min())} to {int(rows.max())}, but there are {made} rows"
                f"{' and -1' if lowest else ', and model.projector.image_newline is false'}"
            )
    side, channels = model.vision.image_size_px, model.vision.num_channels
    tiles, pixels = prompt.tiles_TCHW, prompt.pixels_X
    if tiles is not None and len(tiles) and (tiles.dtype != torch.uint8 or tuple(tiles.shape[1:]) != (channels, side, side)):
        raise PromptError(
            f"prompt {number}: tiles are {tiles.dtype} of shape {tuple(tiles.shape)}, "
            f"the encoder takes uint8 (T, {channels}, {side}, {side})"
        )
    if prompt.tile_grids:
        expected = channels * model.vision.patch_size_px**2 * sum(r * c for r, c in prompt.tile_grids)
        if pixels is None or pixels.dtype != torch.uint8 or pixels.numel() != expected:
            got = "no pixels" if pixels is None else f"{pixels.numel()} values of {pixels.dtype}"
            raise PromptError(f"prompt {number}: {got}, but its grids {prompt.tile_grids} need {expected} of uint8")
