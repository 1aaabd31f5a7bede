"""The sample index: one row per sample with everything that planning needs, and the byte offsets that reading needs.

Built once per data set and settings from tar headers and JSON alone (no picture is decoded), cached, and the same on every rank.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megavlm.config.schema import DataConfig, ImageConfig, ModelConfig, SourceConfig
from megavlm.data.chat import Chat
from megavlm.data.resizing import PictureGrid, make_resizing, plan_pictures
from megavlm.data.shards import RawSample, Sample, ShardError, ShardReader, parse_sample, scan_shard, shard_paths
from megavlm.data.tokenizer import Tokenizer
from megavlm.planner.flops import VisionWork

FORMAT_VERSION = 2
Objective = Literal["multimodal", "text", "vision_classification"]
_MAX_PROBLEMS = 10
log = logging.getLogger(__name__)


class SampleIndexError(ValueError):
    """A data set that cannot be indexed as the recipe asks; names the samples."""


@dataclass
class SampleIndex:
    """Columns over the samples of one source. Shape legend: R rows (samples), I images of all rows in order."""

    folder: Path
    shard_names: list[str]
    task_names: list[str]
    """task_names[task_ids[row]] is the row's task."""
    objective: Objective
    fingerprint: str
    """Hash of what plans depend on: keys, lengths, tiles, targets and tasks. Survives copying the data set."""
    max_label: int
    """Largest label in any object; -1 without objects."""
    keys: np.ndarray = field(repr=False)
    """bytes (R,): the samples' names."""
    length_tokens: np.ndarray = field(repr=False)
    """int64 (R,): exact, visual tokens included. vision_classification: 1, so that a pack's budget counts images."""
    num_tiles: np.ndarray = field(repr=False)
    """int64 (R,): tiles of all pictures; native resolution: pictures."""
    num_patches: np.ndarray = field(repr=False)
    """int64 (R,): over all tiles."""
    patch_pairs: np.ndarray = field(repr=False)
    """int64 (R,): sum over tiles of the square of their patches."""
    num_targets: np.ndarray = field(repr=False)
    """int64 (R,): supervised tokens. vision_classification: patches."""
    task_ids: np.ndarray = field(repr=False)
    """int64 (R,)."""
    shard_ids: np.ndarray = field(repr=False)
    json_offset: np.ndarray = field(repr=False)
    json_size: np.ndarray = field(repr=False)
    image_start: np.ndarray = field(repr=False)
    """int64 (R + 1,): images of row r are image_start[r] .. image_start[r + 1]."""
    image_offset: np.ndarray = field(repr=False)
    """int64 (I,): byte offset in the row's shard."""
    image_size: np.ndarray = field(repr=False)
    """int64 (I,): bytes."""

    def __len__(self) -> int:
        return len(self.length_tokens)

    @cached_property
    def reader(self) -> ShardReader:
        """Random access into the shards."""
        return ShardReader(self.folder, self.shard_names)

    def key(self, row: int) -> str:
        """The sample's name."""
        return bytes(self.keys[row]).decode()

    def task(self, row: int) -> str:
        """The sample's task."""
        return self.task_names[int(self.task_ids[row])]

    def where(self, row: int) -> str:
        """The sample's address for messages."""
        return f"{self.folder / self.shard_names[int(self.shard_ids[row])]}: sample {self.key(row)!r}"

    def sample(self, row: int) -> Sample:
        """The sample's JSON, read from its shard. Raises ShardError when the shard changed."""
        text = self.reader.read(int(self.shard_ids[row]), int(self.json_offset[row]), int(self.json_size[row]))
        return parse_sample(text, self.where(row))

    def image(self, row: int, number: int) -> bytes:
        """Encoded bytes of the sample's picture `number`."""
        at = int(self.image_start[row]) + number
        return self.reader.read(int(self.shard_ids[row]), int(self.image_offset[at]), int(self.image_size[at]))


_COLUMNS = (
    *("keys", "length_tokens", "num_tiles", "num_patches", "patch_pairs", "num_targets", "task_ids"),
    *("shard_ids", "json_offset", "json_size", "image_start", "image_offset", "image_size"),
)


def sample_grids(sample: Sample, data: DataConfig, model: ModelConfig, objective: Objective) -> list[PictureGrid]:
    """Plan of each picture of a sample, from metadata alone. vision_classification always takes one tile."""
    image = ImageConfig() if objective == "vision_classification" else data.image
    return plan_pictures([(i.width, i.height) for i in sample.images], make_resizing(image, model), image)


def build_index(
    source: SourceConfig,
    data: DataConfig,
    model: ModelConfig,
    objective: Objective,
    tokenizer: Tokenizer,
    progress: bool = True,
) -> SampleIndex:
    """Index of one source, from its cache when nothing changed since.

    The cache lies in `.megavlm-index/` beside the shards (under the user's cache folder when that is read-only), named by a hash
    of the shards' names, sizes and times and of every setting that a column depends on. It is written under another name and
    renamed, so any number of ranks may build or read at once; cheapest is that rank 0 builds before the others ask.

    Args:
        progress: show a progress bar while scanning.

    Raises:
        SampleIndexError: no shards; no sample left by split and tasks, or none of a named task; samples that the objective cannot
            take (up to ten are named); a sample longer than data.seq_len_tokens or with more patches than data.max_patches_per_pack; a
            tokenizer larger than the model's vocabulary.
        ShardError: a shard or sample that breaks the format.
    """
    folder = Path(source.path)
    paths = shard_paths(folder)
    if not paths:
        raise SampleIndexError(f"{folder} has no shard-*.tar files" + ("" if folder.is_dir() else " (there is no such folder)"))
    if tokenizer.vocab_size > model.language.vocab_size:
        raise SampleIndexError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but model.language.vocab_size is {model.language.vocab_size}:"
            f" set it to at least {tokenizer.vocab_size}"
        )
    chat = Chat(data.chat_template, tokenizer)
    name = _cache_key(paths, source, data, model, objective, tokenizer, chat) + ".npz"
    index = _load(folder, name)
    if index is None:
        index = _scan(folder, paths, source, data, model, objective, chat, progress)
        _save(index, folder, name)
    _check_budgets(index, data)
    return index


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
        raise SampleIndexError(
            f"{len(over)} of {len(index)} samples do not fit a pack; the largest is {index.where(row)} with {int(column[row])} {unit}"
            f" > {field_name}={limit}. Raise {field_name}, lower data.image.max_tiles (now {data.image.max_tiles}) or drop them"
        )


def _cache_key(
    paths: list[Path], source: SourceConfig, data: DataConfig, model: ModelConfig, objective: Objective, tokenizer: Tokenizer, chat: Chat
) -> str:
    stats = [(p.name, s.st_size, s.st_mtime_ns) for p in paths for s in (p.stat(),)]
    vision = (model.vision.image_size_px, model.vision.patch_size_px, model.visual_tokens_per_tile)
    tasks = sorted(source.tasks) if source.tasks is not None else None
    image = data.image.model_dump(exclude={"decoder"})
    parts = [FORMAT_VERSION, stats, source.split, tasks, image, vision, objective, tokenizer.fingerprint, chat.jinja()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _cache_folders(folder: Path) -> list[Path]:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return [folder / ".megavlm-index", base / "megavlm" / "index"]


def _load(folder: Path, name: str) -> SampleIndex | None:
    for place in _cache_folders(folder):
        if not (place / name).is_file():
            continue
        try:
            with np.load(place / name, allow_pickle=False) as file:
                head: dict[str, Any] = json.loads(str(file["head"]))
                return SampleIndex(folder=folder, **head, **{c: file[c] for c in _COLUMNS})
        except Exception as error:  # a damaged cache is rebuilt: it holds nothing that the shards do not
            log.warning("index cache %s cannot be read (%s: %s); building it again", place / name, type(error).__name__, error)
    return None


def _save(index: SampleIndex, folder: Path, name: str) -> None:
    head = {k: getattr(index, k) for k in ("shard_names", "task_names", "objective", "fingerprint", "max_label")}
    for place in _cache_folders(folder):
        partial = place / f".{name}.{uuid.uuid4().hex}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                np.savez(file, head=np.array(json.dumps(head)), **{c: getattr(index, c) for c in _COLUMNS})
            os.replace(partial, place / name)
            return
        except OSError as error:
            log.info("no index cache in %s: %s", place, error)
            if place.is_dir():
                partial.unlink(missing_ok=True)
    log.warning("the index of %s could not be cached: every start will scan its shards again", folder)


@dataclass
class _Row:
    key: bytes
    length_tokens: int
    vision: VisionWork
    num_targets: int
    task: str
    shard: int
    json_offset: int
    json_size: int
    images: list[tuple[int, int]]
    max_label: int


def _scan(
    folder: Path,
    paths: list[Path],
    source: SourceConfig,
    data: DataConfig,
    model: ModelConfig,
    objective: Objective,
    chat: Chat,
    progress: bool,
) -> SampleIndex:
    reader = ShardReader(folder, [p.name for p in paths])
    rows: list[_Row] = []
    problems: list[str] = []
    num_problems, num_seen, seen_tasks = 0, 0, set()
    for shard, path in enumerate(_with_progress(paths, f"indexing {folder.name}", progress)):
        for raw in scan_shard(path):
            where = f"{path}: sample {raw.key!r}"
            try:
                sample = parse_sample(reader.read(shard, raw.json.offset, raw.json.size_bytes), where)
                num_seen += 1
                seen_tasks.add((sample.split, sample.task))
                if sample.split != source.split or (source.tasks is not None and sample.task not in source.tasks):
                    continue
                rows.append(_row(raw, shard, sample, data, model, objective, chat))
            except ValueError as error:
                num_problems += 1
                if len(problems) < _MAX_PROBLEMS:
                    problems.append(str(error) if isinstance(error, ShardError) else f"{where}: {error}")
    reader.close()
    if problems:
        more = f"\n  ... and {num_problems - len(problems)} more" if num_problems > len(problems) else ""
        raise SampleIndexError(f"{num_problems} samples of {folder} cannot be used:\n  " + "\n  ".join(problems) + more)
    if not rows:
        there = ", ".join(f"{s}/{t}" for s, t in sorted(seen_tasks))
        raise SampleIndexError(
            f"{folder}: none of {num_seen} samples has split={source.split!r} and tasks={source.tasks}; it holds {there}"
        )
    if missing := sorted(set(source.tasks or ()) - {r.task for r in rows}):
        there = ", ".join(sorted(t for s, t in seen_tasks if s == source.split))
        raise SampleIndexError(
            f"{folder}: no sample of split {source.split!r} has task {', '.join(map(repr, missing))}; its tasks are {there}"
        )
    return _columns(folder, paths, rows, objective)


def _row(raw: RawSample, shard: int, sample: Sample, data: DataConfig, model: ModelConfig, objective: Objective, chat: Chat) -> _Row:
    missing = [i.file for i in sample.images if i.file not in raw.files]
    if missing:
        raise ValueError(f"the shard has no file {missing[0]}")
    if objective == "text" and sample.images:
        raise ValueError(f"objective=text takes no pictures, and this sample has {len(sample.images)}: choose other data.sources.*.tasks")
    grids = sample_grids(sample, data, model, objective)
    work = VisionWork.total(g.work for g in grids)
    if objective == "vision_classification":
        if len(sample.images) != 1 or sample.objects is None:
            raise ValueError(
                f"objective=vision_classification takes one picture with objects; this sample has {len(sample.images)} pictures and"
                f" {'no objects field' if sample.objects is None else 'objects'}: choose data.sources.*.tasks that have them"
            )
        length, targets = 1, model.vision.num_patches
    else:
        encoded = chat.encode_conversation([m.model_dump() for m in sample.messages], [g.tokens for g in grids])
        length, targets = len(encoded.ids_L), encoded.num_targets
    return _Row(
        key=raw.key.encode(),
        length_tokens=length,
        vision=work,
        num_targets=targets,
        task=sample.task,
        shard=shard,
        json_offset=raw.json.offset,
        json_size=raw.json.size_bytes,
        images=[(raw.files[i.file].offset, raw.files[i.file].size_bytes) for i in sample.images],
        max_label=max((o.label for o in sample.objects or []), default=-1),
    )


def _columns(folder: Path, paths: list[Path], rows: list[_Row], objective: Objective) -> SampleIndex:
    tasks = sorted({r.task for r in rows})
    task_number = {t: i for i, t in enumerate(tasks)}

    def column(value: Callable[[_Row], int]) -> np.ndarray:
        return np.array([value(r) for r in rows], dtype=np.int64)

    images = [i for r in rows for i in r.images]
    columns = {
        "keys": np.array([r.key for r in rows], dtype=np.bytes_),
        "length_tokens": column(lambda r: r.length_tokens),
        "num_tiles": column(lambda r: r.vision.tiles),
        "num_patches": column(lambda r: r.vision.patches),
        "patch_pairs": column(lambda r: r.vision.patch_pairs),
        "num_targets": column(lambda r: r.num_targets),
        "task_ids": column(lambda r: task_number[r.task]),
        "shard_ids": column(lambda r: r.shard),
        "json_offset": column(lambda r: r.json_offset),
        "json_size": column(lambda r: r.json_size),
        "image_start": np.concatenate([[0], np.cumsum(column(lambda r: len(r.images)))]).astype(np.int64),
        "image_offset": np.array([o for o, _ in images], dtype=np.int64),
        "image_size": np.array([s for _, s in images], dtype=np.int64),
    }
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, objective, tasks]).encode())
    for name in ("keys", "length_tokens", "num_tiles", "num_patches", "patch_pairs", "num_targets", "task_ids"):
        digest.update(columns[name].tobytes())
    return SampleIndex(
        folder=folder,
        shard_names=[p.name for p in paths],
        task_names=tasks,
        objective=objective,
        fingerprint=digest.hexdigest()[:16],
        max_label=max(r.max_label for r in rows),
        **columns,
    )


def _with_progress(paths: list[Path], title: str, show: bool) -> Iterable[Path]:
    if not show:
        return paths
    from rich.progress import track

    return track(paths, description=title, transient=True)
