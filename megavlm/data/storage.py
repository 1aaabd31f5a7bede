"""Files on a disk or in an object store behind a few functions: a local path stays a `Path` read with os.pread, a URL goes through fsspec.

Object stores come with extras: s3:// needs s3fs, gs:// needs gcsfs. Endpoints, credentials and the like are fsspec's own business
(environment variables such as AWS_ENDPOINT_URL, or files in ~/.config/fsspec).
"""

from __future__ import annotations

import bisect
import fnmatch
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import IO, Any, NamedTuple, ParamSpec, TypeVar

_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}
_READ_AHEAD_BYTES = 8 << 20
_MERGE_GAP_BYTES = 64 << 10
_P = ParamSpec("_P")
_R = TypeVar("_R")


class StorageError(ValueError):
    """A file or folder that cannot be reached; names it, the reason and what to do."""


@dataclass(frozen=True, order=True)
class Url:
    """Address of an object, with as much of pathlib's manner as this package uses."""

    text: str

    @property
    def name(self) -> str:
        """What stands behind the last slash."""
        return self.text.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Url:
        return Url(self.text.rstrip("/").rpartition("/")[0])

    @property
    def protocol(self) -> str:
        """What stands before "://"."""
        return self.text.partition("://")[0]

    def __truediv__(self, name: str) -> Url:
        return Url(f"{self.text.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.text


StoragePath = Path | Url
AnyPath = str | Path | Url


class FileStamp(NamedTuple):
    """What changes when a file's bytes do."""

    size_bytes: int
    stamp: str
    """Local: modification time in ns. Remote: the store's etag, checksum or modification time; "" where it has none."""


def as_path(path: AnyPath) -> StoragePath:
    """`Url` for anything with "://", `Path` for the rest and for file:// URLs."""
    if isinstance(path, Path | Url):
        return path
    if path.startswith("file://"):
        return Path(path.removeprefix("file://"))
    return Url(path.rstrip("/")) if "://" in path else Path(path)


def is_remote(path: AnyPath) -> bool:
    """Whether it goes through fsspec."""
    return isinstance(as_path(path), Url)


def _explained(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn what stores and fsspec raise into StorageError; FileNotFoundError of local files too."""

    @wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return function(*args, **kwargs)
        except StorageError:
            raise
        except Exception as error:  # s3fs, gcsfs, botocore, aiohttp: each has its own family of errors
            first: Any = args[0]  # every decorated function takes its path first
            path = as_path(first)
            if isinstance(path, Path) and not isinstance(error, OSError):
                raise
            raise StorageError(_reason(path, error)) from error

    return call


def _reason(path: StoragePath, error: Exception) -> str:
    kind = type(error).__name__
    if isinstance(path, Url):
        if kind == "NoCredentialsError" or "credential" in str(error).lower():
            return f"{path}: no credentials for {path.protocol}:// ({error}). Set them as its own command line tool wants them"
        if isinstance(error, PermissionError):
            return f"{path}: access is denied ({error}). Check the credentials, and that they may list and read this bucket"
        if isinstance(error, FileNotFoundError) or "NoSuchBucket" in str(error):
            return f"{path}: no such bucket or object ({error})"
    elif isinstance(error, FileNotFoundError):
        return f"{path}: there is no such file or folder"
    return f"{path}: {kind}: {error}"


def _filesystem(url: Url) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it.

    Raises:
        StorageError: fsspec or the package of this protocol is missing; names the extra that brings it.
    """
    extra = _EXTRAS.get(url.protocol)
    advice = f'pip install "megavlm[{extra}]"' if extra else f"install the fsspec package of {url.protocol}://"
    try:
        import fsspec  # type: ignore[import-untyped]

        return fsspec.core.url_to_fs(url.text)
    except ImportError as error:
        raise StorageError(f"{url}: {error}. Run: {advice}") from error
    except ValueError as error:
        raise StorageError(f"{url}: {error}") from error


@_explained
def list_files(folder: AnyPath, pattern: str) -> list[StoragePath]:
    """Files of a folder (not below it) whose name matches the shell pattern, in order of name; empty where there is no such folder."""
    place = as_path(folder)
    if isinstance(place, Path):
        return sorted(p for p in place.glob(pattern))
    files, path = _filesystem(place)
    bucket = path.split("/", 1)[0]
    if place.protocol in _EXTRAS and "/" not in path.rstrip("/") and not files.exists(bucket):
        raise StorageError(f"{place}: there is no such bucket")
    files.invalidate_cache(path)
    try:
        found = files.ls(path, detail=True)
    except FileNotFoundError:
        if place.protocol in _EXTRAS and not files.exists(bucket):
            raise StorageError(f"{place}: there is no bucket {bucket!r}, or these credentials cannot see it") from None
        return []
    names = {str(f["name"]).rstrip("/").rpartition("/")[2] for f in found if f["type"] == "file"}
    return [place / name for name in sorted(fnmatch.filter(names, pattern))]


@_explained
def exists(path: AnyPath) -> bool:
    """Whether there is such a file or folder."""
    place = as_path(path)
    if isinstance(place, Path):
        return place.exists()
    files, inner = _filesystem(place)
    files.invalidate_cache(inner.rpartition("/")[0])
    return bool(files.exists(inner))


@_explained
def stamp(path: AnyPath) -> FileStamp:
    """Size and version of a file, for cache keys."""
    place = as_path(path)
    if isinstance(place, Path):
        info = place.stat()
        return FileStamp(info.st_size, str(info.st_mtime_ns))
    files, inner = _filesystem(place)
    return _remote_stamp(files.info(inner))


def _remote_stamp(info: dict[str, Any]) -> FileStamp:
    version = next(
        (info[k] for k in ("ETag", "etag", "md5Hash", "crc32c", "LastModified", "updated", "mtime", "created") if info.get(k)), ""
    )
    return FileStamp(int(info["size"]), str(version).strip('"'))


@_explained
def read_bytes(path: AnyPath) -> bytes:
    """The whole file."""
    place = as_path(path)
    if isinstance(place, Path):
        return place.read_bytes()
    files, inner = _filesystem(place)
    return bytes(files.cat_file(inner))


@_explained
def read_range(path: AnyPath, offset: int, size_bytes: int) -> bytes:
    """`size_bytes` bytes from `offset` on; fewer at the file's end."""
    place = as_path(path)
    if isinstance(place, Path):
        with place.open("rb") as file:
            file.seek(offset)
            return file.read(size_bytes)
    files, inner = _filesystem(place)
    try:
        return bytes(files.cat_file(inner, start=offset, end=offset + size_bytes)) if size_bytes else b""
    except Exception as error:
        if "InvalidRange" in str(error) or "not satisfiable" in str(error).lower():
            return b""
        raise


@_explained
def read_ranges(path: AnyPath, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Several (offset, size_bytes) of one file. Remote ones are fetched at once, near ones in one request."""
    place = as_path(path)
    if isinstance(place, Path):
        fd = os.open(place, os.O_RDONLY)
        try:
            return [pread(fd, offset, size) for offset, size in ranges]
        finally:
            os.close(fd)
    files, inner = _filesystem(place)
    runs = _merged(ranges)
    found = files.cat_ranges([inner] * len(runs), [start for start, _ in runs], [end for _, end in runs], on_error="raise")
    starts = [start for start, _ in runs]
    parts = []
    for offset, size in ranges:
        at = bisect.bisect_right(starts, offset) - 1
        parts.append(bytes(found[at][offset - starts[at] : offset - starts[at] + size]) if size else b"")
    return parts


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(start, end) of the requests that cover all ranges: a small gap costs less than another request."""
    runs: list[tuple[int, int]] = []
    for offset, size in sorted(r for r in ranges if r[1]):
        if runs and offset <= runs[-1][1] + _MERGE_GAP_BYTES:
            runs[-1] = (runs[-1][0], max(runs[-1][1], offset + size))
        else:
            runs.append((offset, offset + size))
    return runs


def pread(fd: int, offset: int, size_bytes: int) -> bytes:
    """Bytes of an open local file without moving its position; fewer at its end."""
    data = os.pread(fd, size_bytes, offset)
    while 0 < len(data) < size_bytes:  # one pread returns at most 2 GiB, and less on some network file systems
        more = os.pread(fd, size_bytes - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


@_explained
def open_read(path: AnyPath) -> IO[bytes]:
    """Seekable stream; a remote one reads ahead in blocks of 8 MiB."""
    place = as_path(path)
    if isinstance(place, Path):
        return place.open("rb")
    files, inner = _filesystem(place)
    return files.open(inner, "rb", block_size=_READ_AHEAD_BYTES, cache_type="readahead")


@contextmanager
def open_write(path: AnyPath) -> Iterator[IO[bytes]]:
    """Stream whose file appears under its name, whole, only when the block ends without an error. Folders are made as needed.

    Raises:
        StorageError: the place cannot be written.
    """
    place = as_path(path)
    if isinstance(place, Path):
        with _local_write(place) as file:
            yield file
        return
    files, _ = _filesystem(place)
    if not files.async_impl:  # such a store (fsspec's memory, ssh, ...) shows a file while it is still being written
        with tempfile.SpooledTemporaryFile(max_size=_READ_AHEAD_BYTES) as waiting:
            yield waiting
            waiting.seek(0)
            _send(place, waiting)
        return
    file = _open_remote(place)
    try:
        yield file
    except BaseException:
        file.closed = True  # so that what waits in memory is not sent by its destructor
        file.discard()
        raise
    _finish_remote(place, file)


@_explained
def _send(url: Url, content: IO[bytes]) -> None:
    files, inner = _filesystem(url)
    files.makedirs(files._parent(inner), exist_ok=True)
    with files.open(inner, "wb") as file:
        shutil.copyfileobj(content, file, _READ_AHEAD_BYTES)


@_explained
def _open_remote(url: Url) -> Any:
    files, inner = _filesystem(url)
    file = files.open(inner, "wb", autocommit=False)
    files.transaction.files.remove(file)  # fsspec would keep it for a transaction that nobody ends
    return file


@_explained
def _finish_remote(url: Url, file: Any) -> None:
    file.close()
    file.commit()
    file.fs.invalidate_cache(file.fs._parent(file.path))


@contextmanager
def _local_write(path: Path) -> Iterator[IO[bytes]]:
    partial = path.parent / f".{path.name}.{uuid.uuid4().hex}.partial"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise StorageError(_reason(path, error)) from error
    finally:
        if path.parent.is_dir():
            partial.unlink(missing_ok=True)


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write a whole file; readers see the old one or the new one, never a part."""
    with open_write(path) as file:
        file.write(data)


@_explained
def remove(path: AnyPath) -> None:
    """Delete a file; nothing happens where there is none."""
    place = as_path(path)
    if isinstance(place, Path):
        place.unlink(missing_ok=True)
        return
    files, inner = _filesystem(place)
    if files.exists(inner):
        files.rm_file(inner)


@_explained
def rename(source: AnyPath, target: AnyPath) -> None:
    """Move a file inside one place, replacing what is there; in an object store it is copied by the store itself."""
    place, to = as_path(source), as_path(target)
    if isinstance(place, Path):
        os.replace(place, str(to))
        return
    files, inner = _filesystem(place)
    files.mv(inner, _filesystem(Url(str(to)))[1])
