"""Shards: plain WebDataset tar files holding `{key}.json` and the sample's pictures, written once and read by byte offset.

The folder is a path or the URL of an object store's folder (megavlm.data.storage).
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megavlm.data.images import measure_image
from megavlm.data.sample import (
    MAX_KEY_BYTES,
    ImageEntry,
    Message,
    ObjectEntry,
    Sample,
    ShardError,
    check_sample,
    content_hash,
    parse_sample,
)
from megavlm.data.storage import (
    AnyPath,
    StorageError,
    StoragePath,
    Url,
    as_path,
    list_files,
    open_write,
    pread,
    read_range,
    read_ranges,
    remove,
    rename,
)
from megavlm.data.tar_scan import Member, RawSample, scan_shard

__all__ = [
    "ImageEntry",
    "Member",
    "Message",
    "ObjectEntry",
    "RawSample",
    "Sample",
    "ShardError",
    "ShardReader",
    "ShardWriter",
    "check_sample",
    "content_hash",
    "parse_sample",
    "scan_shard",
    "shard_paths",
]

_EXTENSION = re.compile(r"[A-Za-z0-9]+")
_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MAX_OPEN_SHARDS = 128


class ShardWriter:
    """Write samples into `shard-00000.tar`, `shard-00001.tar`, ... of one folder.

    Use as a context manager: the shards take their names only when the block ends without an error, so that a reader never sees
    half a data set. The same samples give the same bytes.

    Args:
        folder: a path or URL; created when missing; must hold no shards. For an object store each shard waits on the local disk
            (TMPDIR) until it is whole, is sent under another name, and is renamed at the end.
        samples_per_shard: samples of each file but the last.

    Raises:
        ShardError: the folder already has shards; from `write`, an invalid key, sample or picture.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000) -> None:
        if samples_per_shard < 1:
            raise ShardError(f"samples_per_shard={samples_per_shard} must be at least 1")
        self.folder = as_path(folder)
        if isinstance(self.folder, Path):
            self.folder.mkdir(parents=True, exist_ok=True)
        present = shard_paths(self.folder)
        if present:
            raise ShardError(
                f"{folder} already holds {len(present)} shards ({present[0].name}, ...): choose an empty folder or delete them"
            )
        for stale in list_files(self.folder, ".shard-*.tar.partial"):
            remove(stale)
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self._keys: set[str] = set()
        self._partial: list[StoragePath] = []
        self._tar: tarfile.TarFile | None = None
        self._local: Path | None = None

    def write(self, key: str, sample: Mapping[str, Any], images: Sequence[bytes] = (), extensions: Sequence[str] | None = None) -> None:
        """Append one sample.

        Args:
            key: unique name; letters, digits, "-" and "_" (a dot would end the key in WebDataset's reading).
            sample: the JSON of docs/data.md. `images` may be left out: it is then filled in from the pictures. Where it is given it
                must agree with them, and may add what a picture does not say (time_s).
            images: encoded pictures, stored untouched.
            extensions: one per picture, without dot; None: from each picture's format.
        """
        where = f"sample {key!r}"
        if not _KEY.fullmatch(key):
            raise ShardError(f"{where}: a key takes letters, digits, '-' and '_', and begins with a letter or digit")
        if len(key) > MAX_KEY_BYTES:
            raise ShardError(f"sample {key[:40]!r}...: the key has {len(key)} bytes, the most is {MAX_KEY_BYTES}")
        if key in self._keys:
            raise ShardError(f"{where}: the key was already written")
        if extensions is not None and len(extensions) != len(images):
            raise ShardError(f"{where}: {len(extensions)} extensions for {len(images)} images")
        entries = []
        for i, data in enumerate(images):
            try:
                measured = measure_image(data)
            except ValueError as error:
                raise ShardError(f"{where}: image {i} cannot be read: {error}") from error
            extension = extensions[i].lstrip(".") if extensions is not None else measured.extension
            if not _EXTENSION.fullmatch(extension):
                raise ShardError(f"{where}: image {i} has the extension {extension!r}: it takes letters and digits")
            name = f"{key}.{i}.{extension}"
            digest = hashlib.sha256(data).hexdigest()
            entries.append({"file": name, "width": measured.width, "height": measured.height, "sha256": digest})
        checked = check_sample({**sample, "images": _merged_entries(sample, entries, where)}, where)
        self._keys.add(key)
        tar = self._current()
        _add(tar, f"{key}.json", checked.model_dump_json(exclude_defaults=True).encode())
        for entry, data in zip(checked.images, images, strict=True):
            _add(tar, entry.file, data)
        self.num_samples += 1

    def _current(self) -> tarfile.TarFile:
        if self._tar is None or self.num_samples % self.samples_per_shard == 0:
            self._end_shard()
            path = self.folder / f".shard-{len(self._partial):05d}.tar.partial"
            self._partial.append(path)
            if isinstance(path, Url):
                handle, name = tempfile.mkstemp(prefix="megavlm-shard-")
                os.close(handle)
                self._local = Path(name)
            self._tar = tarfile.open(path if isinstance(path, Path) else self._local, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115
        return self._tar

    def _end_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._tar = None
        if self._local is not None:
            with self._local.open("rb") as whole, open_write(self._partial[-1]) as target:
                shutil.copyfileobj(whole, target, 8 << 20)
            self._local.unlink()
            self._local = None

    def close(self) -> None:
        """Finish the files and give them their names."""
        self._end_shard()
        for path in self._partial:
            if isinstance(path, Path):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            rename(path, self.folder / path.name.removeprefix(".").removesuffix(".partial"))
        self._partial = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        if self._tar is not None:
            self._tar.close()
        if self._local is not None:
            self._local.unlink(missing_ok=True)
        for path in self._partial:
            remove(path)


def _merged_entries(sample: Mapping[str, Any], entries: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """The sample's own image entries completed by the measured ones. Raises ShardError where the two disagree."""
    if "images" not in sample:
        return entries
    given = [dict(e) for e in sample["images"]]
    if len(given) != len(entries) or any(k in measured and measured[k] != v for g, measured in zip(given, entries) for k, v in g.items()):  # noqa: B905
        raise ShardError(f"{where}: its images field says {given}, the pictures say {entries}")
    return [{**g, **measured} for g, measured in zip(given, entries, strict=True)]


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mtime = 0
    tar.addfile(info, io.BytesIO(data))


def shard_paths(folder: AnyPath) -> list[StoragePath]:
    """The folder's shards in order of name."""
    return list_files(folder, "shard-*.tar")


class _OpenFile:
    """A read-only file descriptor, closed when nobody holds it any more: eviction cannot pull it from under a reading thread."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ShardReader:
    """Random access into the shards of one folder by byte offset (os.pread; for a URL, range requests). Thread-safe; keeps at most
    128 files open.

    Raises:
        ShardError: from `read`, a missing shard or one that ends too early.
    """

    def __init__(self, folder: AnyPath, names: Sequence[str]) -> None:
        self.folder = as_path(folder)
        self.names = list(names)
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size_bytes: int) -> bytes:
        """`size_bytes` bytes of shard number `shard`, from `offset` on."""
        path = self.folder / self.names[shard]
        if isinstance(path, Path):
            file = self._file(shard, path)  # held by name until it is read: eviction by another thread would close it
            data = pread(file.fd, offset, size_bytes)
        else:
            try:
                data = read_range(path, offset, size_bytes)
            except StorageError as error:
                raise ShardError(f"cannot read shard {error}") from error
        return _whole(data, path, offset, size_bytes)

    def read_many(self, shard: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Several (offset, size_bytes) of one shard; from an object store they come together instead of one after another."""
        path = self.folder / self.names[shard]
        if isinstance(path, Path):
            return [self.read(shard, offset, size) for offset, size in ranges]
        try:
            found = read_ranges(path, ranges)
        except StorageError as error:
            raise ShardError(f"cannot read shard {error}") from error
        return [_whole(data, path, offset, size) for data, (offset, size) in zip(found, ranges, strict=True)]

    def _file(self, shard: int, path: Path) -> _OpenFile:
        with self._lock:
            file = self._open.pop(shard, None)
            if file is None:
                try:
                    file = _OpenFile(path)
                except OSError as error:
                    raise ShardError(f"cannot open shard {path}: {error}") from error
            self._open[shard] = file
            while len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return file

    def close(self) -> None:
        """Forget all open files."""
        with self._lock:
            self._open.clear()


def _whole(data: bytes, path: StoragePath, offset: int, size_bytes: int) -> bytes:
    if len(data) != size_bytes:
        raise ShardError(f"{path} ends before byte {offset + size_bytes}: it was cut or replaced after it was indexed")
    return data
