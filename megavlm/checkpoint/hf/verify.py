"""Does a Hugging Face folder hold the model of a checkpoint? Tensor by tensor, and by the logits of both implementations."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint import folders, store
from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import config_from_hf, network
from megavlm.checkpoint.hf.export import checkpoint_source, find_checkpoint, hf_tensors
from megavlm.checkpoint.hf.load import open_weights
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.seeded import seeded_prompts
from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.data.prompt import prompt_batch
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
    with open_weights(folder, model) as weights:
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
    kind = family(model.family)
    hf = kind.hf_model(folder)
    image_token = getattr(hf.config, kind.image_token_field, None)
    prompts = seeded_prompts(model, kind.image_from_hf(Path(folder), model), image_token, seed)
    ours = VisionLanguageModel(model, PrecisionConfig(dtype="fp32"), ParallelConfig(), ctx)
    for module, where in store.module_folders(checkpoint).items():
        if getattr(ours, module, None) is not None:
            store.load(where, [ours], None, ctx, modules={module})
    batch = prompt_batch(prompts, -1 if image_token is None else image_token, model)
    with torch.no_grad():
        hidden = ours.eval().transform(batch, ours.packing(batch))
        theirs = [hf(**kind.hf_inputs(model, prompt)).logits[0].float() for prompt in prompts]
        return ours.language.logits(hidden), torch.cat(theirs)


def _check_same_model(checkpoint: Path, model: ModelConfig) -> None:
    """Everything of the model block that shapes the network must agree."""
    stored = folders.read_state(checkpoint).get("model")
    if stored is None:
        return
    ours = ModelConfig.model_validate(stored)
    here, there = network(ours), network(model)
    names = [name for name in here | there if here.get(name) != there.get(name)]
    if names:
        differing = [f"model.{name}: {here.get(name)!r} in the checkpoint, {there.get(name)!r} in the folder" for name in names]
        raise HuggingFaceError(f"{checkpoint} and the folder hold different models: " + "; ".join(differing))
