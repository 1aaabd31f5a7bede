"""From a run, a checkpoint or a live model to a Hugging Face folder that transformers loads without custom code.

The folder is written beside its place and renamed when it is whole. Weights are streamed: a tensor is read and split into
Hugging Face's tensors while the one before it is written. An export that was killed goes on where it was.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

import megavlm
from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import HuggingFaceError, some
from megavlm.checkpoint.hf.config import config_to_hf
from megavlm.checkpoint.hf.links import Link
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.sources import CheckpointSource, LiveSource, TensorSource, find_checkpoint
from megavlm.checkpoint.hf.targets import check_apart, check_free
from megavlm.checkpoint.hf.tensor_files import Entry
from megavlm.checkpoint.hf.tensors import to_theirs
from megavlm.checkpoint.hf.texts import Texts
from megavlm.checkpoint.hf.weight_files import Group, write_weights
from megavlm.checkpoint.journal import publish
from megavlm.config.schema import ImageConfig, ModelConfig
from megavlm.data.chat import Chat
from megavlm.models.weights import is_vocabulary

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SPARE_BYTES = 50_000_000
"""For everything beside tensors."""


@dataclass(frozen=True)
class Exported:
    """What was written."""

    folder: Path
    num_tensors: int
    num_parameters: int
    dtype: str


def export_hf(
    source: str | Path | Sequence[torch.nn.Module],
    folder: str | Path,
    *,
    model: ModelConfig | None = None,
    chat: Chat | None = None,
    image: ImageConfig | None = None,
    dtype: Literal["fp32", "bf16"] | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Exported:
    """Write the weights of the family's Hugging Face class, config, generation config, tokenizer, chat template and processor.

    Args:
        source: a run's folder (its newest checkpoint), a checkpoint's folder, or the chunks of a model on a single rank.
        model: the recipe's model block; None: the one that the checkpoint was saved with. A live model needs it.
        chat: tokenizer and chat template; None: those of the run's recipe, or of the folder that a checkpoint was imported from.
        image: how pictures become tiles; None: as the run's recipe says, outside a run one stretched tile.
        dtype: format of the weights; None: as they are.
        max_shard_bytes: a file that would grow beyond this is followed by another, with an index.
        overwrite: replace a Hugging Face folder that is already there.

    Raises:
        HuggingFaceError: the model has a part that Hugging Face's class lacks, its processor cannot cut pictures as training did,
            the checkpoint lacks a module, no tokenizer is known, there is too little room on the disk, the folder is, holds or lies
            in what is exported, or is there already (with `overwrite`: and is no Hugging Face folder).
        CheckpointError: the checkpoint is incomplete or damaged, or another process is writing the folder.
        OSError: the disk is full or broken; what was written stays.
    """
    given, folder = Path(folder), Path(folder).resolve()
    check_free(folder, overwrite)
    if isinstance(source, str | Path):
        checkpoint = find_checkpoint(source)
        model = model or ModelConfig.model_validate(folders.read_state(checkpoint).get("model") or _no_model(checkpoint))
        stored = CheckpointSource(checkpoint)
        read: CheckpointSource | LiveSource = stored
        texts = Texts.of_checkpoint(checkpoint, model, chat, image)
        kept = [texts.kept] if texts is not None and texts.kept is not None else []
        check_apart(folder, [*stored.homes.values(), *kept], around=[source])
    else:
        assert model is not None, "a live model comes with its ModelConfig"
        read = LiveSource(source)
        texts = Texts.given(model, chat, image)
    if texts is None:
        raise HuggingFaceError(f"no tokenizer is known for {source}: give one (--tokenizer, --chat-template)")
    texts.check()  # what is refused is refused before the first byte is written
    config_to_hf(model, texts.ids, base=texts.base_config)
    groups = groups_of(model, read, dtype)
    unfinished = folder.with_name(folder.name + folders.UNFINISHED)
    total = sum(entry.nbytes for group in groups for entry in group.entries)
    written_before = sum(file.stat().st_size for file in unfinished.glob("*.safetensors"))
    check_room(folder.parent, total - written_before, folder)
    try:
        written = write_weights(groups, unfinished, max_shard_bytes, _job(read, model, dtype, max_shard_bytes))
        if isinstance(read, CheckpointSource):
            read.check()
    finally:
        if isinstance(read, CheckpointSource):
            read.close()
    config = config_to_hf(model, texts.ids, dtype=written.dtype, base=texts.base_config) | texts.picture_config()
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    texts.write(unfinished)
    check_free(folder, overwrite)  # hours may have passed
    publish(unfinished, folder, replace=overwrite)
    return Exported(given, written.num_tensors, written.num_parameters, written.dtype)


def groups_of(model: ModelConfig, read: TensorSource, dtype: str | None = None) -> list[Group]:
    """Every Hugging Face weight, in the order of the forward pass, made when asked for. Raises HuggingFaceError for a wrong shape."""

    def make(link: Link) -> Sequence[torch.Tensor]:
        ours = read(link.key)
        return to_theirs(link, ours if dtype is None else ours.to(DTYPES[dtype]))

    groups = []
    for link in family(model.family).links(model):
        _check_shape(link, read.shape(link.key))
        number = read.dtype(link.key) if dtype is None else DTYPES[dtype]
        groups.append(Group(tuple(Entry(part.name, part.shape, number) for part in link.parts), partial(make, link)))
    return groups


def hf_tensors(model: ModelConfig, read: TensorSource, dtype: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(disk name, tensor) of every Hugging Face weight, in the order of the forward pass."""
    for group in groups_of(model, read, dtype):
        yield from zip((entry.name for entry in group.entries), group.make(), strict=True)


def check_room(where: Path, wanted_bytes: int, target: Path) -> None:
    """Raise HuggingFaceError before hours of work when the disk cannot hold the result."""
    existing = next(p for p in (where, *where.absolute().parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < wanted_bytes + _SPARE_BYTES:
        raise HuggingFaceError(
            f"{target} needs {wanted_bytes / 1e9:.2f} GB more, and its disk has {free / 1e9:.2f} GB free: make room, or write elsewhere"
        )


def _job(read: CheckpointSource | LiveSource, model: ModelConfig, dtype: str | None, max_shard_bytes: int) -> Any:
    """What makes two exports the same."""
    source: Any = read.identity() if isinstance(read, CheckpointSource) else uuid.uuid4().hex
    return [source, model.model_dump(mode="json"), dtype, max_shard_bytes, megavlm.__version__]


def _check_shape(link: Link, ours: tuple[int, ...]) -> None:
    """Weights must not be cut in the wrong place."""
    padded = is_vocabulary(link.key) and ours[0] >= link.shape[0] and ours[1:] == link.shape[1:]
    if ours != link.shape and not padded:
        raise HuggingFaceError(f"{link.key} has shape {ours}, the model block wants {link.shape} for {some(link.names)}")


def _no_model(checkpoint: Path) -> Any:
    raise HuggingFaceError(f"{checkpoint}/state.json does not say which model it holds: give the model block")
