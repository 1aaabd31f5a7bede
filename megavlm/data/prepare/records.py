"""Records (one mapping a sample) from JSON, JSONL, CSV, TSV and Parquet files, read as a stream and by reference where they are large."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, Any

from megavlm.data.prepare.files import PictureFinder, below, is_folder, parent, suffix, walk
from megavlm.data.prepare.jsonstream import JsonStream
from megavlm.data.prepare.types import Entry, Format, PrepareError, PrepareOptions, Refused
from megavlm.data.storage import as_path, open_read, stamp

RECORD_SUFFIXES = ("json", "jsonl", "ndjson", "csv", "tsv", "parquet")
_MAX_CSV_FIELD_CHARS = 1 << 24


def record_files(path: str) -> list[str]:
    """The file itself, or all record files below a folder.

    Raises:
        PrepareError: nothing there, or a file of another kind.
    """
    if is_folder(path):
        found = [n for n in walk(path) if suffix(n) in RECORD_SUFFIXES]
        if not found:
            raise PrepareError(f"{path}: the folder holds no file that ends in .{', .'.join(RECORD_SUFFIXES)}")
        return below(path, found)
    if suffix(path) not in RECORD_SUFFIXES:
        raise PrepareError(f"{path}: the format wants a file that ends in .{', .'.join(RECORD_SUFFIXES)}, or a folder of them")
    return [path]


def record_entries(path: str, needed: tuple[str, ...] = ()) -> Iterator[tuple[Entry, float]]:
    """Entries of all records below `path`; `read_record` turns each into its record.

    Args:
        path: file or folder.
        needed: columns that a CSV or Parquet file must have.

    Raises:
        PrepareError: a file that is broken as a whole, or lacks a column.
    """
    files = record_files(path)
    sizes = [max(1, stamp(f).size_bytes) for f in files]
    done = 0
    for file, size in zip(files, sizes, strict=True):
        for entry, share in _one_file(file, size, needed):
            yield entry, (done + share * size) / sum(sizes)
        done += size


def read_record(entry: Entry) -> dict[str, Any]:
    """The record of an entry. Raises Refused when it is no JSON object."""
    kind, *rest = entry.payload
    if kind == "value":
        record = rest[0]
    elif kind == "line":
        try:
            record = json.loads(rest[0])
        except (ValueError, RecursionError) as error:  # a number of 5000 digits is a plain ValueError
            raise Refused("line that is not JSON", str(error)) from None
    elif kind == "cells":
        names, cells = rest
        if len(names) != len(cells):
            raise Refused("row with another number of cells", f"{len(cells)} cells, and the first line names {len(names)} columns")
        record = dict(zip(names, cells, strict=True))
    elif kind == "parquet":
        file, _, group, row = rest
        return {name: column[row].as_py() for name, column in _row_group(file, group).items()}
    else:
        raise AssertionError(kind)
    if not isinstance(record, dict):
        raise Refused("record that is no object", f"it is a {type(record).__name__}, and fields are wanted")
    return record


def _one_file(file: str, size: int, needed: tuple[str, ...]) -> Iterator[tuple[Entry, float]]:
    kind = suffix(file)
    if kind == "parquet":
        yield from _parquet(file, needed)
        return
    with open_read(as_path(file)) as stream:
        if kind == "json" and _first_byte(stream) == b"[":
            values = JsonStream(stream, file)
            for number, value in enumerate(values.array()):
                yield Entry(f"{file}: entry {number}", ("value", value)), values.num_bytes / size
            values.end()
        elif kind in ("csv", "tsv"):
            yield from _table(stream, file, size, "\t" if kind == "tsv" else ",", needed)
        else:
            read = 0
            for number, line in enumerate(stream, 1):
                read += len(line)
                if line.strip():
                    yield Entry(f"{file}: line {number}", ("line", line.removeprefix(b"\xef\xbb\xbf").strip())), read / size


def _first_byte(stream: IO[bytes]) -> bytes:
    head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    return head[:1]


def _table(stream: IO[bytes], file: str, size: int, separator: str, needed: tuple[str, ...]) -> Iterator[tuple[Entry, float]]:
    csv.field_size_limit(_MAX_CSV_FIELD_CHARS)
    rows = csv.reader(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), delimiter=separator, strict=True)
    names: list[str] | None = None
    try:
        for row in rows:
            if names is None:
                names = row
                _check_columns(file, names, needed)
            elif row:
                yield Entry(f"{file}: line {rows.line_num}", ("cells", names, row)), min(1.0, stream.tell() / size)
    except (csv.Error, UnicodeDecodeError) as error:
        raise PrepareError(f"{file}: line {rows.line_num}: not a valid table: {error}") from error
    if names is None:
        raise PrepareError(f"{file}: the file is empty; its first line must name the columns")


def _check_columns(file: str, names: list[str], needed: tuple[str, ...]) -> None:
    missing = [n for n in needed if n not in names]
    if missing:
        raise PrepareError(
            f"{file}: there is no column {', '.join(map(repr, missing))} (it has: {', '.join(names)}). "
            "Say what they are called with --columns, as in --columns image=url,caption=text"
        )


def _parquet(file: str, needed: tuple[str, ...]) -> Iterator[tuple[Entry, float]]:
    """References to rows: pictures inside a Parquet file are read where they are needed, one row group at a time."""
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet as parquet  # type: ignore[import-untyped]

    try:
        with open_read(as_path(file)) as stream:
            table = parquet.ParquetFile(stream)
            _check_columns(file, table.schema_arrow.names, needed)
            counts = [table.metadata.row_group(g).num_rows for g in range(table.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise PrepareError(f"{file}: not a whole Parquet file: {error}") from error
    version, number, total = tuple(stamp(file)), 0, max(1, sum(counts))
    for group, count in enumerate(counts):
        for row in range(count):
            yield Entry(f"{file}: row {number}", ("parquet", file, version, group, row)), (number + 1) / total
            number += 1


@lru_cache(maxsize=1)
def _row_group(file: str, group: int) -> dict[str, Any]:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        with open_read(as_path(file)) as stream:
            table = parquet.ParquetFile(stream).read_row_group(group)
    except (pyarrow.ArrowException, OSError) as error:
        raise PrepareError(f"{file}: row group {group} cannot be read: {error}") from error
    return dict(zip(table.column_names, table.columns, strict=True))


def text_field(record: dict[str, Any], name: str, what: str) -> str:
    """A text that must be there and hold more than white space."""
    value = record.get(name)
    if value is None:
        raise Refused(f"no {what}", f"field {name!r} is missing (fields: {', '.join(map(str, record)) or 'none'})")
    if not isinstance(value, str):
        raise Refused(f"{what} that is no text", f"field {name!r} is {value!r:.100}")
    if not value.strip():
        raise Refused(f"empty {what}", f"field {name!r} holds only white space")
    return value


def identity(record: dict[str, Any], name: str) -> dict[str, Any]:
    """The `meta` that lets a person find the entry again."""
    value = record.get(name)
    return {"id": value} if isinstance(value, str | int) and value != "" else {}


class RecordFormat(Format):
    """A format whose INPUT is records, with pictures beside it or below --images."""

    def __init__(self, asked: PrepareOptions) -> None:
        super().__init__(asked)
        self.pictures = PictureFinder(asked.images or parent(asked.input))

    def entries(self) -> Iterator[tuple[Entry, float]]:
        return record_entries(self.asked.input)
