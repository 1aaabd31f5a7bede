"""What runs in the ranks of a pool to prove a family: forward passes in any layout, gradients, generation.

Shape legend: L rows of a pass, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.checkpoint.hf import config_from_hf, load_hf
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.tensors import to_ours
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.prompt import Prompt, prompt_batch
from megavlm.data.types import PackedBatch
from megavlm.inference.generate import generate
from megavlm.models.weights import sharded_tensors
from megavlm.parallel.context import ParallelContext, enter_grid
from megavlm.testing.tiny import tiny_chunks


def loaded(folder: Path, layout: dict[str, Any]) -> tuple[list[Any], ModelConfig, ParallelContext]:
    """The folder's model in a layout, on this rank, in evaluation mode."""
    model, parallel = config_from_hf(folder), ParallelConfig(**layout)
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    chunks: Any = tiny_chunks(model, ctx, parallel)
    load_hf(chunks, folder, model, ctx)
    return [chunk.eval() for chunk in chunks], model, ctx


@torch.no_grad()
def logits_of_packs(folder: Path, layout: dict[str, Any], packs: list[list[Prompt]], image_token: int) -> list[torch.Tensor] | None:
    """(tokens of the pack, V) of each pack, on the ranks of the last pipeline stage."""
    chunks, model, ctx = loaded(folder, layout)
    out = [pass_through(chunks, prompt_batch(pack, image_token, model), ctx) for pack in packs]
    return out if ctx.is_last_stage else None  # type: ignore[return-value]


def pass_through(chunks: Any, batch: PackedBatch, ctx: ParallelContext) -> torch.Tensor | None:
    """Logits of a batch, through all pipeline stages by plain sends; None before the last stage.

    The rows that stages hand on are told in a message of their own: a model may send more than one a token.
    """
    hidden = None
    for chunk in chunks:
        for stage in range(ctx.grid.pipeline):
            source = dist.get_global_rank(ctx.pipeline_group, (stage - 1) % ctx.grid.pipeline)
            following = dist.get_global_rank(ctx.pipeline_group, (stage + 1) % ctx.grid.pipeline)
            if stage != ctx.pipeline_rank:
                continue
            if not chunk.pre_process:
                rows = torch.empty(1, dtype=torch.int64)
                dist.recv(rows, source)
                received = torch.empty(int(rows), 1, chunk.config.hidden_size)
                dist.recv(received, source)
                chunk.set_input_tensor(received)
            hidden = chunk.transform(batch, chunk.packing(batch))
            if not chunk.post_process:
                dist.send(torch.tensor([hidden.shape[0]]), following)
                dist.send(hidden, following)
    return chunks[-1].language.logits(hidden) if chunks[-1].post_process else None


def gradients(folder: Path, prompts: list[Prompt], image_token: int, steps: int, lr: float, theirs: list[dict[str, torch.Tensor]]) -> Any:
    """Three plain gradient steps on one rank, compared with Hugging Face's.

    `theirs` are its gradients of each step by the names on the disk; the loss is the mean over the tokens of the pack's second half of
    each sample. Returns for each step (our norm, their norm, largest difference over the largest gradient).
    """
    (chunk,), model, ctx = loaded(folder, {})
    chunk.train()
    batch, table = prompt_batch(prompts, image_token, model), {link.key: link for link in family(model.family).links(model)}
    rows, targets = targets_of(prompts, model.language.vocab_size)
    found = []
    for step in range(steps):
        for parameter in chunk.parameters():
            parameter.grad = None
        logits = chunk.language.logits(chunk.transform(batch, chunk.packing(batch)))
        torch.nn.functional.cross_entropy(logits[rows], targets).backward()
        ours2 = theirs2 = difference = largest = 0.0
        by_storage = {p.data_ptr(): p for p in chunk.parameters()}
        for tensor in sharded_tensors([chunk], ctx):
            link = table[tensor.key]
            where = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, tensor.local_shape, strict=True))
            want = to_ours(link, lambda name, a, b, step=step: theirs[step][name][a:b], where)  # type: ignore[misc]
            got = _gradient(tensor.data, by_storage, want)
            ours2, theirs2 = ours2 + float(got.square().sum()), theirs2 + float(want.square().sum())
            difference, largest = max(difference, float((got - want).abs().max())), max(largest, float(want.abs().max()))
        found.append((ours2**0.5, theirs2**0.5, difference / max(largest, 1e-12)))
        with torch.no_grad():
            for parameter in chunk.parameters():
                if parameter.grad is not None:
                    parameter -= lr * parameter.grad
    return found


def _gradient(data: torch.Tensor, by_storage: dict[int, torch.nn.Parameter], like: torch.Tensor) -> torch.Tensor:
    """The gradient of a slice of a parameter (gate and up are two slices of one), without padding rows."""
    for parameter in by_storage.values():
        begin = parameter.data_ptr()
        if begin <= data.data_ptr() < begin + parameter.numel() * parameter.element_size():
            if parameter.grad is None:
                return torch.zeros_like(like)
            start = (data.data_ptr() - begin) // parameter.element_size()
            own = parameter.grad.flatten()[start : start + data.numel()].view(data.shape)
            return own[: like.shape[0]].reshape(like.shape) if own.numel() >= like.numel() else own
    raise AssertionError("a sharded tensor that is no parameter's storage")


def targets_of(prompts: list[Prompt], vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the pack that predict a token of the last five of each sample, and those tokens; not those that no head predicts."""
    rows, targets, start = [], [], 0
    for prompt in prompts:
        ids = list(prompt.ids)
        for i in range(len(ids) - 5, len(ids)):
            if ids[i] < vocab_size:
                rows.append(start + i - 1)
                targets.append(ids[i])
        start += len(ids)
    return torch.tensor(rows), torch.tensor(targets)


def generated(folder: Path, layout: dict[str, Any], prompts: list[Prompt], image_token: int, max_new_tokens: int) -> list[list[int]]:
    """Greedy answers of all prompts together."""
    (chunk,), _, _ = loaded(folder, layout)
    return generate(chunk, prompts, max_new_tokens=max_new_tokens, stop_ids=[], image_token_id=image_token)
