"""The sample index: one row per sample with everything that planning needs, and the byte offsets that reading needs.

It is put together from three things, each kept and each made again only when what it depends on changes: the catalog (shards), the token
counts (tokenizer and conversation format) and the picture plans (resizing policy and budgets). No picture is decoded. The result is the
same on every rank and is mapped from a file, so that the processes of a machine share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import numpy as np

from megavlm.config.schema import DataConfig, ModelConfig, SourceConfig
from megavlm.data.catalog import ShardStamp, build_catalog, shard_stamps, user_cache
from megavlm.data.chat import Chat
from megavlm.data.index_rows import FORMAT_VERSION, Unusable, index_rows, select_rows
from megavlm.data.sample_index import Objective, SampleIndex, SampleIndexError, open_index, save_index
from megavlm.data.storage import StorageError, StoragePath, as_path, exists, write_bytes
from megavlm.data.token_table import CACHE_FOLDER, table_key
from megavlm.data.tokenizer import Tokenizer

__all__ = ["Objective", "SampleIndex", "SampleIndexError", "build_index"]

_UNUSABLE = ".unusable.jsonl"
"""Beside the index: a line a sample that data.unusable=drop left out."""
_NUM_SHOWN = 5
log = logging.getLogger(__name__)


def build_index(
    source: SourceConfig,
    data: DataConfig,
    model: ModelConfig,
    objective: Objective,
    tokenizer: Tokenizer,
    progress: bool = True,
) -> SampleIndex:
    """Index of one source, from its cache when nothing changed since.

    The cache lies in `.megavlm-index/` beside the shards (under the user's cache folder when that cannot be written, and for object
    stores), named by a hash of the shards' names, sizes and times and of every setting that a column depends on. It is written under
    another name and renamed, so any number of ranks may build or read at once; cheapest is that rank 0 builds before the others ask.

    Args:
        progress: show a progress bar while scanning and tokenising.

    Raises:
        SampleIndexError: no shards; no sample left by split and tasks, or none of a named task; samples that the objective cannot
            take (up to ten are named); a sample longer than data.seq_len_tokens or with more patches than data.max_patches_per_pack
            that no policy of data.over_long helps; a tokenizer larger than the model's vocabulary.
        ShardError: a shard or sample that breaks the format.
        StorageError: a folder or object store that cannot be reached.
    """
    folder = as_path(source.path)
    stamps = shard_stamps(folder)
    if not stamps:
        raise SampleIndexError(f"{folder} has no shard-*.tar files" + ("" if exists(folder) else " (there is no such folder)"))
    rows = tokenizer.num_rows(text_only=model.text_only)
    if rows > model.language.num_tokens:
        raise SampleIndexError(
            f"the tokenizer has {rows} tokens but model.language.vocab_size is {model.language.vocab_size}: set it to at least {rows}"
        )
    chat = Chat(data.chat_template, tokenizer, data.image.marks)
    name = _cache_key(stamps, source, data, model, objective, chat) + ".arrow"
    index = _load(folder, name)
    if index is None:
        index, unusable = _assemble(folder, source, data, model, objective, chat, progress)
        index = _save(index, unusable, name)
    if left_out := index.notes.get("unusable"):
        where = index.file.with_suffix(_UNUSABLE) if index.file is not None else "the warnings above"
        log.warning("%s: %d unusable samples are left out (data.unusable=drop): %s", folder, left_out, where)
    fitted = {kind: count for kind, count in index.notes.items() if count and kind != "unusable"}
    if fitted:
        what = ", ".join(f"{count} {kind}" for kind, count in fitted.items())
        log.info("%s: samples that fit no pack: %s (data.over_long=%s)", folder, what, data.over_long)
    _check_budgets(index, data)
    return index


def _assemble(
    folder: StoragePath, source: SourceConfig, data: DataConfig, model: ModelConfig, objective: Objective, chat: Chat, progress: bool
) -> tuple[SampleIndex, Unusable]:
    catalog = build_catalog(folder, progress)
    rows, unreadable = select_rows(catalog, source, data.unusable == "drop")
    index, unusable = index_rows(catalog, rows, data, model, objective, chat, progress)
    if unreadable:
        index.notes["unusable"] += len(unreadable)
        unusable = [*unreadable, *unusable]
    if unusable:
        first = "\n  ".join(why for _, why in unusable[:_NUM_SHOWN])
        log.warning("%s: %d samples cannot be used and are left out; the first:\n  %s", folder, len(unusable), first)
    if not len(index):
        raise SampleIndexError(f"{folder}: data.over_long=[..., drop] left out all {index.notes['dropped']} samples: none fits a pack")
    return index, unusable


def _check_budgets(index: SampleIndex, data: DataConfig) -> None:
    if index.objective == "vision_classification":
        return
    for column, limit, unit, field_name in (
        (index.length_tokens, data.seq_len_tokens, "tokens", "data.seq_len_tokens"),
        (index.num_patches, data.max_patches_per_pack, "patches", "data.max_patches_per_pack"),
    ):
        if limit is None or not (column > limit).any():
            continue
        over = np.flatnonzero(column > limit)
        row = int(over[np.argmax(column[over])])
        others = [p for p in ("lower_resolution", "split_turns", "drop") if p not in data.over_long]
        tried = f" after data.over_long={data.over_long}" if data.over_long else ""
        advice = f", or add to data.over_long: {', '.join(others)}" if others else ""
        raise SampleIndexError(
            f"{len(over)} of {len(index)} samples do not fit a pack{tried}; the largest is {index.where(row)} with"
            f" {int(column[row])} {unit} > {field_name}={limit}. Raise {field_name}, lower data.image.max_tokens_per_sample{advice}"
        )


def _cache_key(
    stamps: list[ShardStamp], source: SourceConfig, data: DataConfig, model: ModelConfig, objective: Objective, chat: Chat
) -> str:
    tasks = sorted(source.tasks) if source.tasks is not None else None
    image = data.image.model_dump(exclude={"decoder"})
    vision = [
        model.vision.model_dump(),
        model.projector.model_dump(),
        model.visual_tokens_per_tile,
        model.language.cross_attention is not None,
    ]
    budgets = [data.over_long, data.seq_len_tokens, data.max_patches_per_pack] if data.over_long else []
    parts = [FORMAT_VERSION, stamps, source.split, tasks, data.unusable, image, vision, objective, table_key(chat), budgets]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:24]


def _cache_folders(folder: StoragePath) -> list[Path]:
    beside = [folder / CACHE_FOLDER] if isinstance(folder, Path) else []
    return [*beside, user_cache(folder)]


def _load(folder: StoragePath, name: str) -> SampleIndex | None:
    for place in _cache_folders(folder):
        if not (place / name).is_file():
            continue
        try:
            return open_index(folder, place / name)
        except Exception as error:  # a damaged cache is made again: it holds nothing that the shards do not
            log.warning("index cache %s cannot be read (%s: %s); building it again", place / name, type(error).__name__, error)
    return None


def _save(index: SampleIndex, unusable: Unusable, name: str) -> SampleIndex:
    """The index from the file it was written to, the unusable samples listed beside; as it is where no place can be written."""
    for place in _cache_folders(index.folder):
        try:
            if unusable:
                lines = "".join(json.dumps({"key": key, "reason": why}) + "\n" for key, why in unusable)
                write_bytes((place / name).with_suffix(_UNUSABLE), lines.encode())
            save_index(index, place / name)
            return open_index(index.folder, place / name)
        except (StorageError, OSError) as error:
            log.info("no index cache in %s: %s", place, error)
    log.warning("the index of %s could not be cached: every start will put it together again", index.folder)
    return index
