"""The catalog of a data set: one Parquet file, a row a sample, with everything about it that no tokenizer or recipe changes.

It is made from tar headers and JSON alone (no picture is decoded), shard by shard, and lies beside the shards as `index.parquet`, where
pandas, DuckDB or Polars read it as they read any table. Only shards whose size or time changed are scanned again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from megavlm.data.sample import MAX_KEY_BYTES, Sample, ShardError, content_hash, parse_sample
from megavlm.data.storage import AnyPath, StorageError, StoragePath, as_path, exists, list_files, open_read, open_write, stamp
from megavlm.data.tar_scan import RawSample, scan_shard

CATALOG_NAME = "index.parquet"
CATALOG_VERSION = 1
UNFINISHED = ".prepare/names.json"
"""Stands in a folder while data prepare names its shards one by one."""
_NAMES = pa.dictionary(pa.int32(), pa.string())
_HEAD = b"megavlm"
_ROWS_PER_GROUP = 1 << 16
_SHARDS_PER_WORKER = 16
_MAX_WORKERS = 16
log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("shard", _NAMES),
        pa.field("json_offset", pa.int64()),
        pa.field("json_size", pa.int32()),
        # One list a row each, an entry a picture, in the order of the sample's images.
        pa.field("image_offset", pa.list_(pa.int64())),
        pa.field("image_size", pa.list_(pa.int64())),
        pa.field("image_width", pa.list_(pa.int32())),
        pa.field("image_height", pa.list_(pa.int32())),
        pa.field("num_frames", pa.int32()),
        pa.field("num_turns", pa.int32()),
        pa.field("source", _NAMES),
        pa.field("task", _NAMES),
        pa.field("split", _NAMES),
        pa.field("weight", pa.float64()),
        pa.field("scores", pa.map_(pa.string(), pa.float64())),
        pa.field("content_hash", pa.binary(16)),
        pa.field("hash_covers_bytes", pa.bool_()),
        pa.field("max_label", pa.int32()),
        pa.field("has_objects", pa.bool_()),
        pa.field("problem", pa.string()),
    ]
)
"""num_frames: pictures that are a video's frames. num_turns: assistant messages. max_label: -1 without objects. problem: why the sample
cannot be used, else null. image_width and image_height are in pixels after EXIF rotation, sizes and offsets in bytes."""


class ShardStamp(NamedTuple):
    """One shard as it was when it was scanned."""

    name: str
    size_bytes: int
    stamp: str


@dataclass(frozen=True)
class Catalog:
    """All samples of a data set."""

    folder: StoragePath
    shards: list[ShardStamp]
    """In order of name, as the rows are."""
    table: pa.Table = field(repr=False)
    """Columns of SCHEMA."""

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def shard_names(self) -> list[str]:
        return [s.name for s in self.shards]

    def shard_ids(self) -> np.ndarray:
        """int32 (R,): number of each row's shard in `shards`."""
        column = self.table["shard"].combine_chunks()
        number = {name: i for i, name in enumerate(self.shard_names)}
        names = column.dictionary.to_pylist()
        lookup = np.array([number.get(n, -1) for n in names] or [-1], dtype=np.int32)  # a deleted shard's name may linger without rows
        return lookup[column.indices.to_numpy(zero_copy_only=False)] if len(column) else np.zeros(0, dtype=np.int32)


def user_cache(folder: AnyPath) -> Path:
    """Where things about a data set lie whose own folder cannot be written (or mapped into memory)."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    place = as_path(folder)
    name = str(place.resolve()) if isinstance(place, Path) else str(place)
    return base / "megavlm" / "index" / hashlib.sha256(name.encode()).hexdigest()[:16]


def shard_stamps(folder: AnyPath) -> list[ShardStamp]:
    """The folder's shards as they are now."""
    return [ShardStamp(p.name, *stamp(p)) for p in list_files(folder, "shard-*.tar")]


def load_catalog(folder: AnyPath, columns: list[str] | None = None) -> Catalog | None:
    """The catalog that lies in the folder (or in the user's cache), whether or not shards changed since; None without one."""
    return next(_catalogs(folder, columns), None)


def _catalogs(folder: AnyPath, columns: list[str] | None = None) -> Iterator[Catalog]:
    for place in (as_path(folder) / CATALOG_NAME, user_cache(folder) / CATALOG_NAME):
        try:
            found = _read(as_path(folder), place, columns) if exists(place) else None
        except Exception as error:  # a damaged catalog is made again: it holds nothing that the shards do not
            log.warning("%s cannot be read (%s: %s); making it again", place, type(error).__name__, error)
            continue
        if found is not None:
            yield found


def build_catalog(folder: AnyPath, progress: bool = True, num_workers: int | None = None) -> Catalog:
    """Catalog of a folder of shards, brought up to date; written to `index.parquet` when something changed.

    Args:
        folder: a path or URL.
        progress: show a progress bar while scanning.
        num_workers: processes that scan; None: by the number of shards and cores.

    Raises:
        ShardError: a shard that is no tar file or breaks the format, or a folder whose shards `megavlm data prepare` has not all
            named yet. A single bad sample is a row with its `problem`.
    """
    place = as_path(folder)
    if exists(place / UNFINISHED):
        raise ShardError(
            f"{folder} holds half a data set: megavlm data prepare was stopped while it named the shards (or still does)."
            " Run the same command again; it finishes within moments"
        )
    now = shard_stamps(place)
    old: Catalog | None = None
    for found in _catalogs(place):
        if found.shards == now:
            return found
        if old is None or len(set(found.shards) & set(now)) > len(set(old.shards) & set(now)):
            old = found
    known = set(old.shards) if old is not None else set()
    changed = [s for s in now if s not in known]
    scanned = dict(zip((s.name for s in changed), _scan_all(place, changed, progress, num_workers), strict=True))
    kept = {s.name for s in now if s in known}
    if old is None or not kept:
        tables = [scanned[s.name] for s in now]
    else:
        tables = list(_interleaved(old.table, now, scanned))
    table = pa.concat_tables([SCHEMA.empty_table(), *tables]).unify_dictionaries().replace_schema_metadata(None)
    catalog = Catalog(place, now, table.combine_chunks())
    _write(catalog)
    return catalog


def _interleaved(old: pa.Table, now: list[ShardStamp], scanned: dict[str, pa.Table]) -> Iterator[pa.Table]:
    """Kept and new rows in the order of the shards; the rows of a shard lie together."""
    column = old["shard"].combine_chunks()
    indices = column.indices.to_numpy(zero_copy_only=False)
    starts = np.flatnonzero(np.diff(indices, prepend=-1))
    ends = np.append(starts[1:], len(indices))
    names = column.dictionary.to_pylist()
    runs = {names[indices[s]]: (int(s), int(e)) for s, e in zip(starts, ends, strict=True)}
    for shard in now:
        if shard.name in scanned:
            yield scanned[shard.name]
        elif shard.name in runs:
            start, end = runs[shard.name]
            yield old.slice(start, end - start)


def _scan_all(folder: StoragePath, shards: list[ShardStamp], progress: bool, num_workers: int | None) -> Iterable[pa.Table]:
    paths = [folder / s.name for s in shards]
    if num_workers is None:
        num_workers = min(len(os.sched_getaffinity(0)), _MAX_WORKERS, len(paths) // _SHARDS_PER_WORKER)
    title = f"indexing {folder.name}"
    if num_workers < 2:
        yield from map(shard_table, with_progress(paths, len(paths), title, progress))
        return
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        yield from with_progress(pool.map(shard_table, paths, chunksize=4), len(paths), title, progress)


def with_progress(things: Iterable[Any], total: int, title: str, show: bool) -> Iterable[Any]:
    """`things`, under a progress bar where one is wanted."""
    if not show:
        return things
    from rich.progress import track

    return track(things, description=title, total=total, transient=True)


def shard_table(path: AnyPath) -> pa.Table:
    """Rows of SCHEMA for one shard. Raises ShardError for a shard that breaks the format."""
    place = as_path(path)
    rows = [_row(place, raw) for raw in scan_shard(place, with_json=True)]
    columns = {f.name: pa.array([r[f.name] for r in rows], type=f.type) for f in SCHEMA}
    return pa.table(columns, schema=SCHEMA)


def _row(path: StoragePath, raw: RawSample) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": raw.key,
        "shard": path.name,
        "json_offset": raw.json.offset,
        "json_size": raw.json.size_bytes,
        "problem": None,
    }
    try:
        sample = parse_sample(raw.text or b"", f"{path}: sample {raw.key!r}")
    except ShardError as error:
        empty = Sample(task="?", split="?")
        return {**row, **_described(empty, []), "problem": str(error), "content_hash": hashlib.sha256(raw.text or b"").digest()[:16]}
    members = [raw.files.get(i.file) for i in sample.images]
    if len(raw.key.encode()) > MAX_KEY_BYTES:
        row["problem"] = f"{path}: sample {raw.key[:40]!r}...: its key has {len(raw.key.encode())} bytes, the most is {MAX_KEY_BYTES}"
        return {**row, **_described(Sample(task="?", split="?"), []), "split": sample.split, "task": sample.task}
    missing = next((i.file for i, m in zip(sample.images, members, strict=True) if m is None), None)
    places = [(m.offset, m.size_bytes) if m is not None else (0, 0) for m in members]
    row.update(_described(sample, places))
    if missing is not None:
        row["problem"] = f"{path}: sample {raw.key!r}: the shard has no file {missing}"
    return row


def _described(sample: Sample, places: list[tuple[int, int]]) -> dict[str, Any]:
    digest, whole = content_hash(sample, [size for _, size in places])
    return {
        "image_offset": [offset for offset, _ in places],
        "image_size": [size for _, size in places],
        "image_width": [i.width for i in sample.images],
        "image_height": [i.height for i in sample.images],
        "num_frames": sum(i.time_s is not None for i in sample.images),
        "num_turns": sum(m.role == "assistant" for m in sample.messages),
        "source": sample.source,
        "task": sample.task,
        "split": sample.split,
        "weight": sample.weight,
        "scores": list(sample.scores.items()),
        "content_hash": digest,
        "hash_covers_bytes": whole,
        "max_label": max((o.label for o in sample.objects or []), default=-1),
        "has_objects": sample.objects is not None,
    }


def _write(catalog: Catalog) -> None:
    head = json.dumps({"version": CATALOG_VERSION, "shards": catalog.shards})
    table = catalog.table.replace_schema_metadata({_HEAD: head.encode()})
    for place in (catalog.folder / CATALOG_NAME, user_cache(catalog.folder) / CATALOG_NAME):
        try:
            with open_write(place) as file:
                pq.write_table(table, file, row_group_size=_ROWS_PER_GROUP, compression="zstd")
            return
        except (StorageError, OSError) as error:
            log.info("no catalog in %s: %s", place, error)
    log.warning("the catalog of %s could not be kept: every start will scan its shards again", catalog.folder)


def _read(folder: StoragePath, place: StoragePath, columns: list[str] | None) -> Catalog | None:
    with open_read(place) as file:
        parquet = pq.ParquetFile(file, read_dictionary=["shard", "source", "task", "split"])
        head = json.loads((parquet.schema_arrow.metadata or {}).get(_HEAD, b"null"))
        if head is None or head["version"] != CATALOG_VERSION:
            log.info("%s was written by another version; making it again", place)
            return None
        table = parquet.read(columns=columns).unify_dictionaries().replace_schema_metadata(None).combine_chunks()
    return Catalog(folder, [ShardStamp(*s) for s in head["shards"]], table)


def dictionary_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """int32 code of each row and the names they stand for, sorted."""
    array = pc.dictionary_encode(column.cast(pa.string())).combine_chunks()
    names = array.dictionary.to_pylist()
    order = sorted(range(len(names)), key=names.__getitem__)
    rank = np.zeros(max(len(names), 1), dtype=np.int32)
    rank[order] = np.arange(len(names), dtype=np.int32)
    codes = array.indices.to_numpy(zero_copy_only=False)
    return (rank[codes] if len(codes) else np.zeros(0, dtype=np.int32)), [names[i] for i in order]
