"""Text token counts of samples, by the hash of their content: counted once per tokenizer and conversation format, whatever pictures become.

A sample's length is its text tokens plus its visual tokens, and only the second depend on the resizing policy. So the counts are kept
beside the catalog, a row per content hash: another policy, another tile count, other shards or another split tokenise nothing again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from megavlm.data.catalog import Catalog, user_cache, with_progress
from megavlm.data.chat import Chat
from megavlm.data.sample import parse_sample
from megavlm.data.shards import ShardReader
from megavlm.data.storage import StorageError, StoragePath, exists, open_read, open_write

TABLE_VERSION = 1
CACHE_FOLDER = ".megavlm-index"
_SCHEMA = pa.schema(
    [
        pa.field("content_hash", pa.binary(16)),
        pa.field("num_tokens", pa.int32()),
        pa.field("num_targets", pa.int32()),
        pa.field("ids_hash", pa.uint64()),
    ]
)
_SAMPLES_PER_TASK = 512
_SAMPLES_PER_WORKER = 20_000
_MAX_WORKERS = 16
log = logging.getLogger(__name__)


class TextTokens(NamedTuple):
    """One conversation in tokens, its pictures left out."""

    num_tokens: int
    """Text tokens: placeholders are not counted."""
    num_targets: int
    ids_hash: int
    """64-bit hash of the ids and the loss mask."""


@dataclass(frozen=True)
class TokenCounts:
    """Token counts of some rows of a catalog, in their order. Shape legend: R rows asked for."""

    num_tokens: np.ndarray = field(repr=False)
    """int32 (R,): see TextTokens; -1 where the sample has a problem."""
    num_targets: np.ndarray = field(repr=False)
    ids_hash: np.ndarray = field(repr=False)
    """uint64 (R,)."""
    problems: dict[int, str]
    """Position among the rows asked for -> why the conversation cannot be used."""


def encode_text(chat: Chat, messages: list[dict[str, str]], num_images: int) -> TextTokens:
    """Counts of one conversation. Raises ValueError as Chat.encode_conversation."""
    encoded = chat.encode_conversation(messages, [1] * num_images)
    return TextTokens(len(encoded.ids_L) - num_images, encoded.num_targets, text_hash(encoded.ids_L, encoded.supervised_L))


def text_hash(ids: np.ndarray, supervised: np.ndarray) -> int:
    """64-bit hash of a conversation's ids, one placeholder a picture, and of its loss mask. Shapes (L,), (L,)."""
    digest = hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8)
    digest.update(np.packbits(supervised).tobytes())
    return int.from_bytes(digest.digest(), "little")


def count_tokens(catalog: Catalog, rows: np.ndarray, chat: Chat, progress: bool = True, num_workers: int | None = None) -> TokenCounts:
    """Counts of `rows` of the catalog; what the table lacks is read from the shards, tokenised and added to it.

    Args:
        num_workers: processes that tokenise; None: by the number of samples and cores.

    Raises:
        ShardError: a shard that changed since the catalog was made.
    """
    hashes = catalog.table["content_hash"].combine_chunks().take(pa.array(rows))
    name = f"tokens-{table_key(chat)}.parquet"
    table = _load(catalog, name)
    at = pc.index_in(hashes, value_set=table["content_hash"].combine_chunks())
    absent = at.is_null().to_numpy(zero_copy_only=False)
    problems: dict[bytes, str] = {}
    if absent.any():
        positions = np.flatnonzero(absent)
        codes = hashes.take(pa.array(positions)).dictionary_encode().indices.to_numpy()
        _, first = np.unique(codes, return_index=True)  # equal content is tokenised once
        new, problems = _tokenise(catalog, rows[np.sort(positions[first])], chat, progress, num_workers)
        table = pa.concat_tables([table, new]).combine_chunks()
        if new.num_rows:
            _save(catalog, name, table)
        at = pc.index_in(hashes, value_set=table["content_hash"].combine_chunks())
    taken = table.select(["num_tokens", "num_targets", "ids_hash"]).take(at)
    columns = [pc.fill_null(taken[c], v).to_numpy() for c, v in (("num_tokens", -1), ("num_targets", 0), ("ids_hash", 0))]
    bad = np.flatnonzero(at.is_null().to_numpy(zero_copy_only=False)).tolist()
    return TokenCounts(columns[0], columns[1], columns[2], {p: problems[hashes[p].as_py()] for p in bad})


def table_key(chat: Chat) -> str:
    """What the counts depend on: tokenizer (with its image token) and conversation format."""
    parts = f"{TABLE_VERSION}\0{chat.fingerprint}\0{chat.tokenizer.image_token}"
    return hashlib.sha256(parts.encode()).hexdigest()[:20]


class _Task(NamedTuple):
    """Samples of one shard whose text a worker counts."""

    folder: StoragePath
    shard_name: str
    ranges: list[tuple[int, int]]
    keys: list[str]


def _tokenise(catalog: Catalog, rows: np.ndarray, chat: Chat, progress: bool, num_workers: int | None) -> tuple[pa.Table, dict[bytes, str]]:
    """Counts of rows with pairwise different content: the table of those that can be used, and why the others cannot, by hash."""
    tasks = _tasks(catalog, rows)
    results: list[TextTokens | str] = [r for part in _run(tasks, chat, len(rows), progress, num_workers) for r in part]
    hashes = catalog.table["content_hash"].combine_chunks().take(pa.array(rows)).to_pylist()
    good = [(h, *r) for h, r in zip(hashes, results, strict=True) if isinstance(r, TextTokens)]
    columns = zip(*good, strict=True) if good else [[] for _ in _SCHEMA]
    table = pa.table({f.name: pa.array(list(c), type=f.type) for f, c in zip(_SCHEMA, columns, strict=True)}, schema=_SCHEMA)
    return table, {h: r for h, r in zip(hashes, results, strict=True) if isinstance(r, str)}


def _tasks(catalog: Catalog, rows: np.ndarray) -> list[_Task]:
    table = catalog.table.select(["key", "json_offset", "json_size"]).take(pa.array(rows))
    shards = catalog.shard_ids()[rows]
    keys, offsets, sizes = (table[c].to_pylist() for c in ("key", "json_offset", "json_size"))
    cuts = np.flatnonzero(np.diff(shards)) + 1
    tasks = []
    for start, end in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
        for i in range(start, end, _SAMPLES_PER_TASK):
            j = min(i + _SAMPLES_PER_TASK, end)
            ranges = list(zip(offsets[i:j], sizes[i:j], strict=True))
            tasks.append(_Task(catalog.folder, catalog.shard_names[shards[i]], ranges, keys[i:j]))
    return tasks


def _run(tasks: list[_Task], chat: Chat, num_samples: int, progress: bool, num_workers: int | None) -> Iterable[list[TextTokens | str]]:
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)), _MAX_WORKERS, num_samples // _SAMPLES_PER_WORKER)
    title = f"tokenising {tasks[0].folder.name}" if tasks else ""
    packed = _pickled(chat) if num_workers > 1 else None
    if packed is None:
        yield from (_count(task, chat) for task in with_progress(tasks, len(tasks), title, progress))
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=_start, initargs=(packed,)) as pool:
        yield from with_progress(pool.map(_count_in_worker, tasks, chunksize=2), len(tasks), title, progress)


def _pickled(chat: Chat) -> bytes | None:
    try:
        return pickle.dumps(chat)  # to our own worker processes; nothing pickled is ever written to a file
    except Exception as error:  # a tokenizer of another library
        log.info("this tokenizer cannot be sent to worker processes (%s); tokenising in one", error)
        return None


_worker_chat: list[Chat] = []


def _start(packed: bytes) -> None:
    _worker_chat.append(pickle.loads(packed))


def _count_in_worker(task: _Task) -> list[TextTokens | str]:
    return _count(task, _worker_chat[0])


def _count(task: _Task, chat: Chat) -> list[TextTokens | str]:
    reader = ShardReader(task.folder, [task.shard_name])
    found: list[TextTokens | str] = []
    for key, text in zip(task.keys, reader.read_many(0, task.ranges), strict=True):
        where = f"{task.folder / task.shard_name}: sample {key!r}"
        sample = parse_sample(text, where)
        try:
            found.append(encode_text(chat, [m.model_dump() for m in sample.messages], len(sample.images)))
        except ValueError as error:
            found.append(f"{where}: {error}")
    reader.close()
    return found


def _places(catalog: Catalog, name: str) -> list[StoragePath]:
    return [catalog.folder / CACHE_FOLDER / name, user_cache(catalog.folder) / name]


def _load(catalog: Catalog, name: str) -> pa.Table:
    for place in _places(catalog, name):
        try:
            if exists(place):
                with open_read(place) as file:
                    return pq.read_table(file, schema=_SCHEMA).combine_chunks()
        except Exception as error:  # damaged: counted again
            log.warning("token counts %s cannot be read (%s: %s); counting again", place, type(error).__name__, error)
    return _SCHEMA.empty_table()


def _save(catalog: Catalog, name: str, table: pa.Table) -> None:
    for place in _places(catalog, name):
        try:
            with open_write(place) as file:
                pq.write_table(table, file, compression="zstd")
            return
        except (StorageError, OSError) as error:
            log.info("no token counts in %s: %s", place, error)
    log.warning("the token counts of %s could not be kept: every start will tokenise again", catalog.folder)
