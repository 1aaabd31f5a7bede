"""From a Hugging Face folder to a checkpoint on the disk: one tensor after the other, no model is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal
from zlib import crc32

import torch

import megavlm
from megavlm.checkpoint.ahead import made_ahead
from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.config import config_from_hf
from megavlm.checkpoint.hf.export import DTYPES, check_room
from megavlm.checkpoint.hf.folder import WeightFolder
from megavlm.checkpoint.hf.links import Link
from megavlm.checkpoint.hf.load import check_weights, links_of, open_weights
from megavlm.checkpoint.hf.targets import check_apart
from megavlm.checkpoint.hf.tensors import to_ours
from megavlm.checkpoint.hf.texts import KEPT, keep_texts
from megavlm.checkpoint.progress import progress_bar
from megavlm.checkpoint.writer import CheckpointWriter


@dataclass(frozen=True)
class Imported:
    """What was written."""

    num_tensors: int
    dtype: str
    num_resumed: int
    """Tensors that an earlier, interrupted start had written already."""


def import_hf(folder: str | Path, checkpoint: str | Path, *, dtype: Literal["fp32", "bf16"] | None = None) -> Imported:
    """Write the model of `folder` as a checkpoint, with its config, tokenizer and processor beside it.

    One process, and a few tensors in memory: one is written while the next is read, put together and cast. A start that was killed, or
    found the disk full, is gone on with by the next of the same folder and `dtype`.

    Raises:
        HuggingFaceError: the checkpoint is there already or would lie in the folder, the folder cannot be read, there is too little room
            on the disk, or the weights have another format than fp32 or bf16 (or several) and `dtype` does not say which to take.
        CheckpointError: another process is writing this checkpoint.
        OSError: the disk is full or broken; what was written stays.
    """
    folder, checkpoint = Path(folder), Path(checkpoint).resolve()
    check_apart(checkpoint, [folder])
    if checkpoint.exists():
        raise HuggingFaceError(f"{checkpoint} is there already: give another folder")
    model = config_from_hf(folder)
    links = links_of(model, folder)
    with open_weights(folder, model) as weights:
        check_weights(weights, links)
        number = dtype or _dtype(weights)
        job = {
            "import": str(folder.resolve()),
            "files": weights.files(),
            "dtype": number,
            "megavlm": megavlm.__version__,
            "links": crc32(repr(links).encode()),
        }
        sizes = {link.key: prod(link.shape) * DTYPES[number].itemsize for link in links}
        total = sum(sizes.values())
        writer = CheckpointWriter(checkpoint, job)
        try:
            done = writer.done
            resumed = sum(sizes[key] for key in done)
            check_room(checkpoint.parent, total - resumed, checkpoint)
            with progress_bar("import", total, resumed) as bar:
                left = _in_reading_order([link for link in links if link.key not in done], weights)
                read = made_ahead(partial(_made, link, weights, DTYPES[number]) for link in left)
                for link in left:
                    writer.add(link.key, next(read))
                    bar.update(sizes[link.key])
            state = {"model": model.model_dump(mode="json"), "step": 0}
            writer.finish(state, more=lambda unfinished: keep_texts(folder, unfinished / KEPT))
        except BaseException:
            writer.leave()
            raise
    return Imported(len(links), number, len(done))


def _made(link: Link, weights: WeightFolder, dtype: torch.dtype) -> torch.Tensor:
    return to_ours(link, weights.rows).to(dtype)


def _in_reading_order(links: Sequence[Link], weights: WeightFolder) -> list[Link]:
    """By file, so that a folder of many is read once from end to end."""
    return sorted(links, key=lambda link: weights.file(link.parts[0].name))


def _dtype(weights: WeightFolder) -> Literal["fp32", "bf16"]:
    names: dict[torch.dtype, Literal["fp32", "bf16"]] = {t: n for n, t in DTYPES.items()}  # type: ignore[misc]
    found = {weights.dtype(name) for name in weights.names}
    if len(found) > 1 or not found <= set(names):
        listed = ", ".join(sorted(str(d).removeprefix("torch.") for d in found))
        raise HuggingFaceError(
            f"{weights.folder} holds {listed} weights, and checkpoints here are bf16 or fp32: add --dtype bf16 (rounded to what training "
            "computes in), or --dtype fp32 (every number as it is, twice the size)"
        )
    return names[found.pop()]
