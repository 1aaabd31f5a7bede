"""From a catalog's rows to the columns of a SampleIndex: token counts, picture plans, and what data.over_long makes of the rest."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]

from megavlm.config.schema import DataConfig, ImageConfig, ModelConfig, SourceConfig
from megavlm.data.catalog import Catalog, dictionary_codes
from megavlm.data.chat import Chat
from megavlm.data.over_long import OverLong, Piece
from megavlm.data.picture_plans import PicturePlans, plan_all, put_grids
from megavlm.data.resizing import make_resizing
from megavlm.data.sample import Sample, parse_sample
from megavlm.data.sample_index import COLUMN_TYPES, GRID_COLUMNS, Objective, SampleIndex, SampleIndexError
from megavlm.data.shards import ShardReader
from megavlm.data.token_table import TextTokens, TokenCounts, count_tokens

FORMAT_VERSION = 4
_MAX_PROBLEMS = 10
log = logging.getLogger(__name__)

Unusable = list[tuple[str, str]]
"""Key of each sample that was left out, and why."""


@dataclass
class _Problems:
    """Rows that cannot be used, for one error that names the first of them."""

    texts: dict[int, str] = field(default_factory=dict)

    def add(self, row: int, text: str) -> None:
        self.texts.setdefault(row, text)

    def raise_if_any(self, folder: object) -> None:
        if not self.texts:
            return
        first = [self.texts[row] for row in sorted(self.texts)[:_MAX_PROBLEMS]]
        more = f"\n  ... and {len(self.texts) - len(first)} more" if len(self.texts) > len(first) else ""
        raise SampleIndexError(f"{len(self.texts)} samples of {folder} cannot be used:\n  " + "\n  ".join(first) + more)


def select_rows(catalog: Catalog, source: SourceConfig, drop: bool = False) -> tuple[np.ndarray, Unusable]:
    """int64 numbers of the catalog's rows of the source's split and tasks, and which others were left out as they are no samples.

    Args:
        drop: leave out what is no sample (where its split cannot be read: of any split), instead of refusing all.

    Raises:
        SampleIndexError: samples that are no samples, no row left, or none of a named task.
    """
    problems = _Problems()
    keys = catalog.table["key"]
    broken = catalog.table["problem"].combine_chunks()
    splits, split_names = dictionary_codes(catalog.table["split"])
    tasks, task_names = dictionary_codes(catalog.table["task"])
    wanted = splits == split_names.index(source.split) if source.split in split_names else np.zeros(len(splits), dtype=bool)
    of_split = wanted.copy()
    if source.tasks is not None:
        wanted &= np.isin(tasks, [task_names.index(t) for t in source.tasks if t in task_names])
    unreadable = splits == split_names.index("?") if "?" in split_names else np.zeros(len(splits), dtype=bool)
    for row in np.flatnonzero(broken.is_valid().to_numpy(zero_copy_only=False) & (wanted | unreadable)).tolist():
        problems.add(row, broken[row].as_py())
    if not drop or not (wanted & broken.is_null().to_numpy(zero_copy_only=False)).any():
        problems.raise_if_any(catalog.folder)
    wanted[list(problems.texts)] = False
    if not wanted.any():
        pairs = sorted({(split_names[s], task_names[t]) for s, t in set(zip(splits.tolist(), tasks.tolist(), strict=True))})
        there = ", ".join(f"{s}/{t}" for s, t in pairs)
        raise SampleIndexError(
            f"{catalog.folder}: none of {len(catalog)} samples has split={source.split!r} and tasks={source.tasks}; it holds {there}"
        )
    present = {task_names[t] for t in np.unique(tasks[wanted]).tolist()}
    if missing := sorted(set(source.tasks or ()) - present):
        there = ", ".join(sorted(task_names[t] for t in np.unique(tasks[of_split]).tolist()))
        raise SampleIndexError(
            f"{catalog.folder}: no sample of split {source.split!r} has task {', '.join(map(repr, missing))}; its tasks are {there}"
        )
    return np.flatnonzero(wanted), [(keys[row].as_py(), why) for row, why in sorted(problems.texts.items())]


def index_rows(
    catalog: Catalog, rows: np.ndarray, data: DataConfig, model: ModelConfig, objective: Objective, chat: Chat, progress: bool
) -> tuple[SampleIndex, Unusable]:
    """The index of some rows of a catalog, and what data.unusable=drop left out of them.

    Raises:
        SampleIndexError: samples that the objective, the conversation format or the resizing policy cannot take.
    """
    assembly = _Assembly(catalog, rows, data, model, objective, chat, progress)
    index = assembly.index()
    return index, [(assembly.table["key"][row].as_py(), why) for row, why in sorted(assembly.problems.texts.items())]


class _Assembly:
    """One run of `index_rows`. Shape legend: R the rows asked for, I their pictures in order."""

    def __init__(
        self, catalog: Catalog, rows: np.ndarray, data: DataConfig, model: ModelConfig, objective: Objective, chat: Chat, progress: bool
    ) -> None:
        self.catalog, self.rows, self.data, self.objective, self.chat = catalog, rows, data, objective, chat
        self.table = catalog.table.take(pa.array(rows)).combine_chunks() if len(rows) < len(catalog) else catalog.table
        self.problems = _Problems()
        lists = self.table["image_width"].combine_chunks()
        self.starts = np.concatenate([[0], np.cumsum(lists.value_lengths().to_numpy(zero_copy_only=False))]).astype(np.int64)
        self.images = {n: self._values(f"image_{n}") for n in ("width", "height", "offset", "size")}
        self._check_objective()
        self.image_config = ImageConfig() if objective == "vision_classification" else data.image
        self.resizing = make_resizing(self.image_config, model, chat.tokenizer)
        self.tokens = self._tokens(model, progress)
        self.plans = plan_all(self.images["width"], self.images["height"], self.starts, self.resizing, self.image_config)
        for row, why in self.plans.refused.items():
            self.problems.add(row, f"{self.where(row)}: {why}")
        self._refuse()

    def _refuse(self) -> None:
        """Raises SampleIndexError for the problems found so far, unless such samples are dropped and others are left."""
        if self.data.unusable == "refuse" or len(self.problems.texts) == len(self.rows):
            self.problems.raise_if_any(self.catalog.folder)

    def _values(self, name: str) -> np.ndarray:
        return np.asarray(self.table[name].combine_chunks().flatten().to_numpy(zero_copy_only=False))

    def where(self, row: int) -> str:
        """A row's address for messages."""
        return f"{self.catalog.folder / self.table['shard'][row].as_py()}: sample {self.table['key'][row].as_py()!r}"

    def _check_objective(self) -> None:
        counts = np.diff(self.starts)
        if self.objective == "text":
            for row in np.flatnonzero(counts).tolist():
                why = f"objective=text takes no pictures, and this sample has {counts[row]}: choose other data.sources.*.tasks"
                self.problems.add(row, f"{self.where(row)}: {why}")
        if self.objective == "vision_classification":
            labelled = self.table["has_objects"].combine_chunks().to_numpy(zero_copy_only=False)
            for row in np.flatnonzero((counts != 1) | ~labelled).tolist():
                why = (
                    f"objective=vision_classification takes one picture with objects; this sample has {counts[row]} pictures and"
                    f" {'objects' if labelled[row] else 'no objects field'}: choose data.sources.*.tasks that have them"
                )
                self.problems.add(row, f"{self.where(row)}: {why}")
        self.problems.raise_if_any(self.catalog.folder)

    def _tokens(self, model: ModelConfig, progress: bool) -> TokenCounts:
        if self.objective == "vision_classification":
            patches = np.full(len(self.rows), model.vision.num_patches, dtype=np.int32)
            return TokenCounts(np.ones_like(patches), patches, np.zeros(len(patches), dtype=np.uint64), {})
        counts = count_tokens(self.catalog, self.rows, self.chat, progress)
        for row, why in counts.problems.items():
            self.problems.add(row, why)
        return counts

    # ------------------------------------------------------------------------------------------------- what does not fit

    def _over_long(self) -> tuple[dict[int, list[Piece]], dict[str, int]]:
        """Pieces that stand in the place of rows which fit no pack or cannot be used, and how many samples became what."""
        policies = OverLong(self.data, self.image_config, self.resizing, self.chat)
        unusable: dict[int, list[Piece]] = {row: [] for row in self.problems.texts}
        if self.objective == "vision_classification":
            return unusable, {"unusable": len(unusable)} if self.data.unusable == "drop" else {}
        limit = self.data.max_patches_per_pack
        over = self.tokens.num_tokens + self.plans.sums("tokens", self.starts) > self.data.seq_len_tokens
        if limit is not None:
            over |= self.plans.sums("patches", self.starts) > limit
        over[list(self.plans.over_cap)] = True
        over[list(unusable)] = False
        found: dict[int, list[Piece]] = {}
        reader = ShardReader(self.catalog.folder, self.catalog.shard_names)
        for row in np.flatnonzero(over).tolist() if self.data.over_long else []:
            pieces = policies.resolve(self._sizes(row), self._text(row), partial(self._read, reader, row))
            if pieces is not None:
                found[row] = pieces
        reader.close()
        for row in set(self.plans.over_cap) - set(found):
            self.problems.add(row, f"{self.where(row)}: {self.plans.over_cap[row]}")
        self._refuse()
        found |= {row: [] for row in self.problems.texts}
        notes = {name: policies.notes[name] for name in ("lowered", "split", "dropped")}
        return found, notes | ({"unusable": len(self.problems.texts)} if self.data.unusable == "drop" else {})

    def _sizes(self, row: int) -> list[tuple[int, int]]:
        span = slice(int(self.starts[row]), int(self.starts[row + 1]))
        return list(zip(self.images["width"][span].tolist(), self.images["height"][span].tolist(), strict=True))

    def _text(self, row: int) -> TextTokens:
        return TextTokens(int(self.tokens.num_tokens[row]), int(self.tokens.num_targets[row]), int(self.tokens.ids_hash[row]))

    def _read(self, reader: ShardReader, row: int) -> Sample:
        shard = self.catalog.shard_names.index(self.table["shard"][row].as_py())
        text = reader.read(shard, self.table["json_offset"][row].as_py(), self.table["json_size"][row].as_py())
        return parse_sample(text, self.where(row))

    # ------------------------------------------------------------------------------------------------- the columns

    def index(self) -> SampleIndex:
        """All columns, each row replaced by its pieces."""
        found, notes = self._over_long()
        layout = _Layout(self.starts, found)
        column = self._scalar_columns(layout)
        images = self._image_columns(layout)
        tasks, task_names = dictionary_codes(self.table["task"])
        column["task_ids"] = tasks[layout.origin]
        column["shard_ids"] = self.catalog.shard_ids()[self.rows][layout.origin]
        for name in ("json_offset", "json_size"):
            column[name] = self.table[name].to_numpy()[layout.origin]
        plans = PicturePlans({n: images[f"image_{n}"] for n in GRID_COLUMNS}, {}, {})
        column["num_tiles"], column["num_patches"] = plans.sums("tiles", layout.starts), plans.sums("patches", layout.starts)
        column["patch_pairs"] = plans.sums("patch_pairs", layout.starts)
        column["length_tokens"] = column.pop("num_tokens").astype(np.int64)
        if self.objective != "vision_classification":
            column["length_tokens"] += plans.sums("tokens", layout.starts)
        columns: dict[str, Any] = {n: v.astype(COLUMN_TYPES[n], copy=False) for n, v in {**column, **images}.items() if n in COLUMN_TYPES}
        labels = self.table["max_label"].to_numpy()[layout.origin]
        keys = self._keys(layout)
        return SampleIndex(
            folder=self.catalog.folder,
            shard_names=self.catalog.shard_names,
            task_names=task_names,
            objective=self.objective,
            fingerprint=self._fingerprint(layout, keys, columns, task_names),
            max_label=int(labels.max(initial=-1)),
            notes=notes,
            keys=keys,
            **columns,
        )

    def _scalar_columns(self, layout: _Layout) -> dict[str, np.ndarray]:
        rows = len(layout.origin)
        column = {n: getattr(self.tokens, n)[layout.origin] for n in ("num_tokens", "num_targets", "ids_hash")}
        column |= {"message_start": np.zeros(rows, np.int32), "message_stop": np.full(rows, -1, np.int32), "num_repeated": np.zeros(rows)}
        for at, _, piece in layout.pieces:
            for name, value in zip(("num_tokens", "num_targets", "ids_hash"), piece.text, strict=True):
                column[name][at] = value
            column["message_start"][at], column["message_stop"][at] = piece.message_start, piece.message_stop
            column["num_repeated"][at] = piece.num_repeated
        return column

    def _image_columns(self, layout: _Layout) -> dict[str, np.ndarray]:
        source = self.starts[layout.origin]
        number = np.arange(layout.starts[-1]) - np.repeat(layout.starts[:-1], layout.counts)
        for at, _, piece in layout.pieces:
            number[layout.starts[at] : layout.starts[at + 1]] = piece.numbers
        taken = np.repeat(source, layout.counts) + number
        columns = {"image_start": layout.starts, "image_number": number}
        columns |= {f"image_{n}": self.images[n][taken] for n in ("offset", "size")}
        columns |= {f"image_{n}": self.plans.columns[n][taken] for n in GRID_COLUMNS}
        for at, _, piece in layout.pieces:
            put_grids(columns, int(layout.starts[at]), piece.grids, prefix="image_")
        return columns

    def _keys(self, layout: _Layout) -> np.ndarray:
        names = [k.encode() for k in self.table["key"].to_pylist()]
        keys = [names[r] for r in layout.origin.tolist()]
        for at, number, piece in layout.pieces:
            if piece.message_stop >= 0:
                keys[at] += f"#{number}".encode()
        return np.array(keys or [b""], dtype=np.bytes_)[: len(keys)]

    def _fingerprint(self, layout: _Layout, keys: np.ndarray, columns: dict[str, np.ndarray], task_names: list[str]) -> str:
        head: list[Any] = [FORMAT_VERSION, self.objective, task_names, keys.dtype.itemsize]
        digest = hashlib.sha256(json.dumps(head).encode())
        hashes = self.table["content_hash"].combine_chunks().take(pa.array(layout.origin))
        content = np.frombuffer(hashes.buffers()[1], dtype=np.uint8)[: 16 * len(hashes)]
        weights = self.table["weight"].to_numpy()[layout.origin]
        parts = [keys, content, weights, *(columns[n] for n in sorted(columns) if n not in _NOT_IN_FINGERPRINT)]
        for part in parts:
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()[:16]


_NOT_IN_FINGERPRINT = ("shard_ids", "json_offset", "json_size", "image_offset", "image_size")
"""Where bytes lie: the same samples in other shards are the same data."""


class _Layout:
    """Which row of the index comes from which row asked for. Shape legend: O rows of the index."""

    def __init__(self, starts: np.ndarray, found: dict[int, list[Piece]]) -> None:
        num_rows = len(starts) - 1
        repeats = np.ones(num_rows, dtype=np.int64)
        for row, pieces in found.items():
            repeats[row] = len(pieces)
        self.origin = np.repeat(np.arange(num_rows), repeats)
        """int64 (O,)."""
        self.counts = np.diff(starts)[self.origin]
        """Pictures of each, int64 (O,)."""
        first = np.concatenate([[0], np.cumsum(repeats)])
        self.pieces = [(int(first[row]) + i, i, piece) for row, pieces in sorted(found.items()) for i, piece in enumerate(pieces)]
        """Row of the index, number of the piece in its sample, the piece."""
        for at, _, piece in self.pieces:
            self.counts[at] = len(piece.numbers)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)]).astype(np.int64)
        """int64 (O + 1,): pictures of each."""
