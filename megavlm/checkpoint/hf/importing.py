"""From a Hugging Face folder to a checkpoint on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from megavlm.checkpoint import store
from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import config_from_hf
from megavlm.checkpoint.hf.export import DTYPES, TEXTS
from megavlm.checkpoint.hf.load import load_hf, open_weights
from megavlm.checkpoint.hf.texts import keep_texts
from megavlm.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import ParallelContext


@dataclass(frozen=True)
class Imported:
    """What was written."""

    num_tensors: int
    dtype: str


def import_hf(
    folder: str | Path, checkpoint: str | Path, ctx: ParallelContext, *, dtype: Literal["fp32", "bf16"] | None = None
) -> Imported:
    """Write the model of `folder` as a checkpoint, with its tokenizer and processor beside it. One rank.

    Raises:
        HuggingFaceError: the checkpoint is there already, the folder cannot be read, or its weights have another format than
            fp32 or bf16 (or several) and `dtype` does not say which to take.
    """
    folder, checkpoint = Path(folder), Path(checkpoint)
    if checkpoint.exists():
        raise HuggingFaceError(f"{checkpoint} is there already: give another folder")
    model = config_from_hf(folder)
    number = dtype or _dtype(folder, model)
    chunk = VisionLanguageModel(model, PrecisionConfig(dtype=number), ParallelConfig(), ctx)
    count = load_hf([chunk], folder, model, ctx)
    store.save(checkpoint, [chunk], None, {"model": model.model_dump(mode="json"), "step": 0}, ctx)
    keep_texts(folder, checkpoint / TEXTS)
    return Imported(count, number)


def _dtype(folder: Path, model: ModelConfig) -> Literal["fp32", "bf16"]:
    names: dict[torch.dtype, Literal["fp32", "bf16"]] = {t: n for n, t in DTYPES.items()}  # type: ignore[misc]
    with open_weights(folder, model) as weights:
        found = {weights.dtype(name) for name in weights.names}
    if len(found) > 1 or not found <= set(names):
        listed = ", ".join(sorted(str(d).removeprefix("torch.") for d in found))
        raise HuggingFaceError(f"{folder} holds {listed} weights; models here are fp32 or bf16: choose one (--dtype)")
    return names[found.pop()]
