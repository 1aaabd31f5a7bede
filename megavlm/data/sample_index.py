"""The sample index as columns, and its file: Arrow, mapped into memory, so that all processes of a machine share one copy of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from megavlm.data.resizing import PictureGrid
from megavlm.data.sample import IMAGE_TOKEN, ImageEntry, Message, ObjectEntry, Sample, parse_sample
from megavlm.data.shards import ShardReader
from megavlm.data.storage import StoragePath, open_write
from megavlm.planner.flops import VisionWork

Objective = Literal["multimodal", "text", "vision_classification"]
_HEAD = b"megavlm"
_HEAD_FIELDS = ("shard_names", "task_names", "objective", "fingerprint", "max_label", "notes")


class SampleIndexError(ValueError):
    """A data set that cannot be indexed as the recipe asks; names the samples."""


@dataclass(eq=False)
class SampleIndex:
    """Columns over the samples of one source. Shape legend: R rows (samples), I images of all rows in order.

    A sample that was split between turns has a row a piece: `sample`, `messages`, `image` and `grids` speak of the piece.
    """

    folder: StoragePath
    shard_names: list[str]
    task_names: list[str]
    """task_names[task_ids[row]] is the row's task."""
    objective: Objective
    fingerprint: str
    """Hash of what plans and batches depend on: keys, content, token ids, weights, lengths, grids, targets, tasks. Survives a copy."""
    max_label: int
    """Largest label in any object; -1 without objects."""
    notes: dict[str, int]
    """What data.over_long did: number of samples lowered, split and dropped; with data.unusable=drop also how many were unusable."""
    keys: np.ndarray = field(repr=False)
    """bytes (R,): the samples' names; pieces of a split one are called key#0, key#1, ..."""
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
    """int32 (R,)."""
    shard_ids: np.ndarray = field(repr=False)
    """int32 (R,)."""
    json_offset: np.ndarray = field(repr=False)
    """int64 (R,)."""
    json_size: np.ndarray = field(repr=False)
    """int32 (R,)."""
    message_start: np.ndarray = field(repr=False)
    """int32 (R,): first message of a piece; the system message comes before it in every piece."""
    message_stop: np.ndarray = field(repr=False)
    """int32 (R,): message behind a piece's last; -1: the whole sample."""
    num_repeated: np.ndarray = field(repr=False)
    """int32 (R,): pictures of earlier turns that a piece shows again before its first message."""
    ids_hash: np.ndarray = field(repr=False)
    """uint64 (R,): token_table.text_hash of the conversation; 0 for vision_classification."""
    image_start: np.ndarray = field(repr=False)
    """int64 (R + 1,): images of row r are image_start[r] .. image_start[r + 1]."""
    image_number: np.ndarray = field(repr=False)
    """int32 (I,): which of the sample's images it is."""
    image_offset: np.ndarray = field(repr=False)
    """int64 (I,): byte offset in the row's shard."""
    image_size: np.ndarray = field(repr=False)
    """int64 (I,): bytes."""
    image_cols: np.ndarray = field(repr=False)
    """int32 (I,): PictureGrid, column by column."""
    image_rows: np.ndarray = field(repr=False)
    image_thumbnail: np.ndarray = field(repr=False)
    """uint8 (I,)."""
    image_tokens: np.ndarray = field(repr=False)
    image_tiles: np.ndarray = field(repr=False)
    image_patches: np.ndarray = field(repr=False)
    image_patch_pairs: np.ndarray = field(repr=False)
    """int64 (I,)."""
    file: Path | None = field(default=None, repr=False)
    """Where the columns are mapped from; None: they are in this process's memory."""

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
        """The sample (of a split one the piece), read from its shard. Raises ShardError when the shard changed."""
        text = self.reader.read(int(self.shard_ids[row]), int(self.json_offset[row]), int(self.json_size[row]))
        whole = parse_sample(text, self.where(row))
        if self.message_stop[row] < 0:
            return whole
        numbers = self.image_number[self.image_start[row] : self.image_start[row + 1]].tolist()
        return piece_of(whole, int(self.message_start[row]), int(self.message_stop[row]), numbers, int(self.num_repeated[row]))

    def messages(self, row: int) -> list[dict[str, str]]:
        """The conversation as chat templates take it, read from the shard."""
        return [m.model_dump() for m in self.sample(row).messages]

    def grids(self, row: int) -> list[PictureGrid]:
        """Plan of each picture: what is cut and how many visual tokens it has, whatever lowered it."""
        span = slice(int(self.image_start[row]), int(self.image_start[row + 1]))
        columns = [getattr(self, f"image_{c}")[span].tolist() for c in GRID_COLUMNS]
        return [
            PictureGrid(cols, rows, bool(thumbnail), tokens, VisionWork(tiles, patches, pairs))
            for cols, rows, thumbnail, tokens, tiles, patches, pairs in zip(*columns, strict=True)
        ]

    def image(self, row: int, number: int) -> bytes:
        """Encoded bytes of the row's picture `number`."""
        at = int(self.image_start[row]) + number
        return self.reader.read(int(self.shard_ids[row]), int(self.image_offset[at]), int(self.image_size[at]))

    def __reduce__(self) -> tuple[Callable[..., SampleIndex], tuple[Any, ...]]:
        """Another process of the same machine maps the same file instead of receiving the columns."""
        if self.file is not None and self.file.is_file():
            return open_index, (self.folder, self.file)
        return SampleIndex, tuple(getattr(self, f.name) for f in fields(self))


GRID_COLUMNS = ("cols", "rows", "thumbnail", "tokens", "tiles", "patches", "patch_pairs")
"""Columns of SampleIndex with the prefix image_: the fields of a PictureGrid."""

COLUMN_TYPES: dict[str, str] = {
    **dict.fromkeys(("length_tokens", "num_tiles", "num_patches", "patch_pairs", "num_targets"), "int64"),
    **dict.fromkeys(("task_ids", "shard_ids", "json_size", "message_start", "message_stop", "num_repeated", "image_number"), "int32"),
    **dict.fromkeys(("json_offset", "image_start", "image_offset", "image_size", "image_patch_pairs"), "int64"),
    **dict.fromkeys(("image_cols", "image_rows", "image_tokens", "image_tiles", "image_patches"), "int32"),
    "image_thumbnail": "uint8",
    "ids_hash": "uint64",
}
"""Every column but the keys."""


def piece_of(whole: Sample, start: int, stop: int, numbers: list[int], num_repeated: int) -> Sample:
    """The piece messages[start:stop] of a sample, as a sample.

    The system message stands before it; `numbers` are its images, the system message's first, then `num_repeated` of earlier turns, which
    are shown again at the beginning of the piece's first message. Objects on other pictures are left out.
    """
    messages = list(whole.messages[start:stop])
    if num_repeated:
        shown = Message(role=messages[0].role, content=f"{IMAGE_TOKEN}\n" * num_repeated + messages[0].content)
        messages[0] = shown
    if start > 0 and whole.messages[0].role == "system":
        messages.insert(0, whole.messages[0])
    place = {number: i for i, number in enumerate(numbers)}
    images: list[ImageEntry] = [whole.images[n] for n in numbers]
    objects: list[ObjectEntry] | None = None
    if whole.objects is not None:
        objects = [o.model_copy(update={"image": place[o.image]}) for o in whole.objects if o.image in place]
    return whole.model_copy(update={"messages": messages, "images": images, "objects": objects})


def save_index(index: SampleIndex, path: Path) -> None:
    """Write the columns as one Arrow file, under another name until it is whole. Raises StorageError where that cannot be done."""
    head = {name: getattr(index, name) for name in _HEAD_FIELDS}
    keys = np.ascontiguousarray(index.keys)
    arrays = {"keys": keys.view(np.uint8), **{name: getattr(index, name) for name in COLUMN_TYPES}}
    columns = {n: pa.LargeListArray.from_arrays(pa.array([0, len(a)], pa.int64()), pa.array(a)) for n, a in arrays.items()}
    metadata = {_HEAD: json.dumps({**head, "key_bytes": keys.dtype.itemsize}).encode()}
    batch = pa.RecordBatch.from_pydict(columns)
    with open_write(path) as file, pa.ipc.new_file(file, batch.schema.with_metadata(metadata)) as writer:
        writer.write_batch(batch.replace_schema_metadata(metadata))


def open_index(folder: StoragePath, path: Path) -> SampleIndex:
    """Index whose columns are mapped from a file that `save_index` wrote. Raises OSError or pyarrow's errors for a damaged one."""
    file = pa.ipc.open_file(pa.memory_map(str(path)))
    head = json.loads(file.schema.metadata[_HEAD])
    batch = file.get_batch(0)
    key_bytes = head.pop("key_bytes")
    columns = {name: batch.column(name).values.to_numpy(zero_copy_only=True) for name in ("keys", *COLUMN_TYPES)}
    columns["keys"] = columns["keys"].view(f"S{key_bytes}")
    return SampleIndex(folder=folder, **head, **columns, file=path)
