"""From a run, a checkpoint or a live model to a Hugging Face folder that transformers loads without custom code.

The folder is written beside its place and renamed when it is whole. Weights are streamed: one tensor at a time is read, split
into Hugging Face's tensors and added to the current shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.utils import unwrap_model
from safetensors.torch import save_file

from megavlm.checkpoint import folders, store
from megavlm.checkpoint.errors import HuggingFaceError, some
from megavlm.checkpoint.hf.config import config_to_hf
from megavlm.checkpoint.hf.folder import INDEX, SINGLE
from megavlm.checkpoint.hf.links import Link
from megavlm.checkpoint.hf.registry import family
from megavlm.checkpoint.hf.tensors import to_theirs
from megavlm.checkpoint.hf.texts import check_pictures, copy_texts, token_ids, write_texts
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.config.schema import DataConfig, ImageConfig, ModelConfig
from megavlm.data.chat import Chat
from megavlm.models.weights import is_vocabulary, sharding_metadata

TensorSource = Callable[[str], torch.Tensor]
"""Checkpoint key -> whole tensor."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXTS = "hf"
"""Subfolder of an imported checkpoint with the tokenizer, processor and chat template of the folder it came from."""


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
        overwrite: replace a folder that is already there.

    Raises:
        HuggingFaceError: the model has a part that Hugging Face's class lacks, its processor cannot cut pictures as training did,
            the checkpoint lacks a module, no tokenizer is known, or the folder is there already.
        CheckpointError: the checkpoint is incomplete or damaged.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise HuggingFaceError(f"{folder} is not empty: give another folder, or allow overwriting it")
    texts: Path | None = None
    if isinstance(source, str | Path):
        checkpoint = find_checkpoint(source)
        model = model or ModelConfig.model_validate(folders.read_state(checkpoint).get("model") or _no_model(checkpoint))
        read = checkpoint_source(checkpoint)
        data = _data_of_run(checkpoint)
        image = image or (data.image if data is not None else None)
        chat = chat or (_chat_of(data) if data is not None else None)
        texts = checkpoint / TEXTS if chat is None and (checkpoint / TEXTS).is_dir() else None
    else:
        assert model is not None, "a live model comes with its ModelConfig"
        read = live_source(source)
    if chat is None and texts is None:
        raise HuggingFaceError(f"no tokenizer is known for {source}: give one (--tokenizer, --chat-template)")
    image = image or ImageConfig()
    check_pictures(model, image)
    ids = token_ids(chat, texts, model)
    config_to_hf(model, ids)  # refuses before the first byte is written
    if chat is not None:
        family(model.family).processor_files(model, image, chat.tokenizer)
    unfinished = folder.with_name(folder.name + folders.UNFINISHED)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    written = write_weights(hf_tensors(model, read, dtype), unfinished, max_shard_bytes)
    config = config_to_hf(model, ids, dtype=written.dtype)
    (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if chat is not None:
        write_texts(unfinished, model, chat, image)
    else:
        assert texts is not None
        copy_texts(texts, unfinished)
    folders.publish(unfinished, folder)
    return Exported(folder, written.num_tensors, written.num_parameters, written.dtype)


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` is, or the newest one of the run that it is. Raises CheckpointError."""
    path = Path(path)
    newest = folders.newest(path)
    if newest is None:
        folders.read_state(path)
    return newest or path


def checkpoint_source(checkpoint: str | Path) -> TensorSource:
    """Tensors of a checkpoint; modules that a later stage of its run did not hold come from the checkpoint that did last."""
    homes = store.module_folders(checkpoint)
    readers: dict[Path, CheckpointReader] = {}

    def read(key: str) -> torch.Tensor:
        module = key.split(".", 1)[0]
        if module not in homes:
            raise HuggingFaceError(f"{checkpoint}: no stage so far has trained or stored the {module}: it has {', '.join(homes)}")
        where = homes[module]
        if where not in readers:
            folders.read_state(where)
            folders.verify(where)
            readers[where] = CheckpointReader(where)
        return readers[where].tensor(key)

    return read


def live_source(chunks: Sequence[torch.nn.Module]) -> TensorSource:
    """Tensors of a model that a single rank holds whole (no tensor or pipeline parallelism)."""
    tensors: dict[str, torch.Tensor] = {}
    for chunk in chunks:
        bare: Any = unwrap_model(chunk)
        for base in nested_values(bare.sharded_state_dict(metadata=sharding_metadata(bare.ctx))):
            if isinstance(base, ShardedTensor) and base.global_shape != base.local_shape:
                raise HuggingFaceError(f"{base.key} is split over ranks: save a checkpoint and export that")
            if isinstance(base, ShardedTensor | ShardedTensorFactory):
                tensors[base.key] = base.data.detach()

    def read(key: str) -> torch.Tensor:
        if key not in tensors:
            raise HuggingFaceError(f"this model has no {key}: export takes a whole model on one rank")
        return tensors[key]

    return read


def hf_tensors(model: ModelConfig, read: TensorSource, dtype: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """(disk name, tensor) of every Hugging Face weight, in the order of the forward pass."""
    for link in family(model.family).links(model):
        ours = read(link.key)
        _check_shape(link, ours)
        yield from zip(link.names, to_theirs(link, ours if dtype is None else ours.to(DTYPES[dtype])), strict=True)


@dataclass(frozen=True)
class Weights:
    """Totals of `write_weights`."""

    num_tensors: int
    num_parameters: int
    dtype: str
    """torch's name; the widest where tensors differ."""


def write_weights(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path, max_shard_bytes: int) -> Weights:
    """safetensors files as transformers writes them: one file, or numbered shards and an index."""
    shards: list[dict[str, tuple[int, str]]] = []
    pending: dict[str, torch.Tensor] = {}
    num_parameters, dtypes = 0, set()

    def flush() -> None:
        save_file(pending, str(folder / f"shard-{len(shards)}"), metadata={"format": "pt"})
        shards.append({name: (t.numel() * t.element_size(), "") for name, t in pending.items()})
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and sum(t.numel() * t.element_size() for t in pending.values()) + size > max_shard_bytes:
            flush()
        # A copy: views of one storage (the parts of a fused weight) cannot be stored as two tensors.
        pending[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        num_parameters += tensor.numel()
        dtypes.add(tensor.dtype)
    flush()
    names = [SINGLE] if len(shards) == 1 else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, name in enumerate(names):
        (folder / f"shard-{i}").rename(folder / name)
    if len(shards) > 1:
        places = {tensor: file for file, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(size for shard in shards for size, _ in shard.values())
        index: dict[str, Any] = {
            "metadata": {"total_parameters": num_parameters, "total_size": total},
            "weight_map": dict(sorted(places.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    widest = max(dtypes, key=lambda d: d.itemsize)
    return Weights(sum(map(len, shards)), num_parameters, str(widest).removeprefix("torch."))


def _check_shape(link: Link, ours: torch.Tensor) -> None:
    """Weights must not be cut in the wrong place."""
    padded = is_vocabulary(link.key) and ours.shape[0] >= link.shape[0] and tuple(ours.shape[1:]) == link.shape[1:]
    if tuple(ours.shape) != link.shape and not padded:
        raise HuggingFaceError(f"{link.key} has shape {tuple(ours.shape)}, the model block wants {link.shape} for {some(link.names)}")


def _no_model(checkpoint: Path) -> Any:
    raise HuggingFaceError(f"{checkpoint}/state.json does not say which model it holds: give the model block")


def _data_of_run(checkpoint: Path) -> DataConfig | None:
    """The data block of the recipe that lies beside a run's checkpoints; None outside a run."""
    recipe_file = checkpoint.parent.parent / "recipe.yaml"
    if checkpoint.parent.name != folders.CHECKPOINTS or not recipe_file.is_file():
        return None
    from megavlm.config.load import load_recipe

    return load_recipe(recipe_file).data


def _chat_of(data: DataConfig) -> Chat:
    from megavlm.data.tokenizer import load_tokenizer

    return Chat(data.chat_template, load_tokenizer(data.tokenizer, data.image_token))
