"""What preparing needs of files beyond megavlm.data.storage: walking folders, moving and deleting, and pictures by any name."""

from __future__ import annotations

import base64
import binascii
import errno
import os
import posixpath
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from megavlm.data.prepare.types import PrepareError, Refused
from megavlm.data.storage import AnyPath, StorageError, StoragePath, Url, as_path, read_bytes

PICTURE_SUFFIXES = frozenset(
    {
        *("jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
        *("jp2", "j2k", "jpx", "ppm", "pgm", "pbm", "pnm"),
    }
)
UNREAD_PICTURE_SUFFIXES = frozenset(
    {*("heic", "heif", "jxl", "jxr", "svg", "svgz", "psd", "ico", "tga", "exr", "hdr", "eps"), *("dng", "cr2", "nef", "arw", "raw")}
)
"""Pictures by their names, of formats that are not read: they are refused, not passed over."""
PROTOCOLS = frozenset({"file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "hdfs"})
"""What an address inside a data set may begin with, besides the protocol of the folder that was named on the command line. Others reach
the web (http, ftp, github, ...) or wrap an address that does (simplecache::http://)."""
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.:_-]*)://")
_OF_THE_FILE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
"""Errors that say something about one name. Any other, a full table of open files or a dead disk, says something about the machine."""


def suffix(name: str) -> str:
    """What stands behind the last dot, in lower case; "" without one."""
    base = name.rpartition("/")[2]
    return base.rpartition(".")[2].lower() if "." in base else ""


def stem(name: str) -> str:
    """Name of a file without folder and last suffix."""
    base = name.rstrip("/").rpartition("/")[2]
    return base.rpartition(".")[0] or base


def walk(folder: AnyPath) -> list[str]:
    """Names of all files below a folder, relative to it, in order; hidden files and folders are left out.

    Links to folders are followed, and each folder is entered once: by its own name where it has one below `folder`, else by the first
    link to it.

    Raises:
        PrepareError: there is no such folder, or one below it cannot be listed.
    """
    place = as_path(folder)
    if isinstance(place, Path):
        if not place.is_dir():
            raise PrepareError(f"{place}: there is no such folder")
        return sorted(_local_files(place))
    files, inner = _remote(place)
    inner = inner.rstrip("/") + "/"
    names = [str(n)[len(inner) :] for n in files.find(inner) if str(n).startswith(inner)]
    if not names:
        raise PrepareError(f"{place}: there is no such folder, or it is empty")
    return sorted(n for n in names if not any(part.startswith(".") for part in n.split("/")))


def _local_files(place: Path) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise PrepareError(f"{error.filename}: the folder cannot be listed: {error.strerror}")

    entered: set[tuple[int, int]] = set()
    starts = [str(place)]
    for start in starts:  # links wait until all real folders are known, so that a loop or a second name gives no file twice
        for here, folders, names in os.walk(start, onerror=fail):
            folder = Path(here)
            info = folder.stat()
            if (info.st_dev, info.st_ino) in entered:
                folders.clear()
                continue
            entered.add((info.st_dev, info.st_ino))
            shown = sorted(f for f in folders if not f.startswith("."))
            links = {f for f in shown if (folder / f).is_symlink()}
            starts += [str(folder / f) for f in sorted(links)]
            folders[:] = [f for f in shown if f not in links]
            base = os.path.relpath(here, place)
            yield from (name if base == "." else f"{base}/{name}" for name in names if not name.startswith("."))


def is_folder(path: AnyPath) -> bool:
    """Whether it is a folder (object stores: whether objects' names begin with it)."""
    place = as_path(path)
    if isinstance(place, Path):
        return place.is_dir()
    files, inner = _remote(place)
    return bool(files.isdir(inner))


def move(old: StoragePath, new: StoragePath) -> None:
    """Rename a file; in an object store a copy inside the store and a deletion."""
    if isinstance(old, Path):
        os.replace(old, str(new))
        return
    files, inner = _remote(old)
    files.mv(inner, _remote(as_path(new))[1])


def delete_folder(path: StoragePath) -> None:
    """Delete a folder and all in it; nothing where there is none."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
        return
    files, inner = _remote(path)
    if files.exists(inner):
        files.rm(inner, recursive=True)


def _remote(place: StoragePath) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]

    try:
        files, inner = fsspec.core.url_to_fs(str(place))
    except ImportError as error:
        raise StorageError(f"{place}: {error}. Install the package that fsspec names") from error
    files.invalidate_cache()
    return files, str(inner)


class PictureFinder:
    """From what a data set says about a picture to its bytes.

    Understood: bytes; {"bytes": ..., "path": ...} (Hugging Face datasets); data: URIs; file:// and object-store URLs; paths, which
    begin at `root` when they are relative. A data set is somebody else's text: names that lead out of `root`, by ".." or by an
    absolute path, are refused, and so is every protocol that is not in PROTOCOLS. With the root "/" all local files may be named.
    """

    def __init__(self, root: str | None) -> None:
        self.root = as_path(root or ".")

    def load(self, value: Any) -> bytes:
        """Raises Refused when there is no such picture, or when its address means nothing here."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, bytes | bytearray):
            return bytes(value)
        if isinstance(value, str) and value.startswith("data:"):
            return _from_data_uri(value)
        return self.read(value, "picture")

    def read(self, name: Any, what: str) -> bytes:
        """Bytes of a file. Raises Refused for a fault of this one file, StorageError for a network or disk that fails."""
        path = self.find(name, what)
        with refusing(path, what):
            return read_bytes(path)

    def find(self, name: Any, what: str) -> StoragePath:
        """Address of a picture or video. Raises Refused for one that may not be opened."""
        if not isinstance(name, str) or not name or "\0" in name:
            raise Refused(f"{what} without address", f"{_short(name)} is neither a path, a URL nor bytes")
        try:
            os.fsencode(name)
        except UnicodeEncodeError:
            raise Refused(f"{what} without address", f"{_short(name)} is no name of a file: it is not Unicode") from None
        if known := _PROTOCOL.match(name):
            protocol, place = known[1].lower(), name[known.end() :]
            if protocol in ("http", "https"):
                raise Refused(f"{what} on the web", f"{_short(name)}: fetch it first, and give --images")
            if protocol not in PROTOCOLS | ({self.root.protocol.lower()} if isinstance(self.root, Url) else set()) or "::" in place:
                raise Refused(f"{what} of an unknown protocol", f"{_short(name)}: known are {', '.join(sorted(PROTOCOLS))}")
            if protocol != "file":
                return Url(f"{protocol}://{place}")
            name = place
        return self._in_root(name, what)

    def _in_root(self, name: str, what: str) -> StoragePath:
        outside = Refused(
            f"{what} outside its folder",
            f"{_short(name)} does not lie below {self.root}: name with --images a folder that holds all (or /)",
        )
        if isinstance(self.root, Url):
            inner = posixpath.normpath(name)
            if inner.startswith(("/", "../")) or inner == ".." or "::" in name:
                raise outside
            return Url(f"{self.root.text}/{inner if '..' in name.split('/') else name}")
        path = self.root / name
        if not name.startswith("/") and ".." not in name.split("/"):
            return path
        path = Path(os.path.normpath(path))  # so that what is opened is what was checked: the system would resolve links before ".."
        absolute = os.path.normpath(path.absolute())
        roots = (os.path.normpath(self.root.absolute()), self.root.resolve())
        if not any(Path(absolute).is_relative_to(root) for root in roots):
            raise outside
        return path


@contextmanager
def refusing(path: StoragePath, what: str) -> Iterator[None]:
    """Open or read one file in this block: what is wrong with it alone becomes Refused; other failures pass."""
    if isinstance(path, Path):
        with suppress(OSError):  # opening it says the same
            if not stat.S_ISREG(mode := path.stat().st_mode) and not stat.S_ISDIR(mode):
                raise Refused(f"{what} that cannot be opened", f"{path} is no plain file but a pipe, socket or device")
    try:
        yield
    except StorageError as error:
        cause = error.__cause__
        if isinstance(cause, FileNotFoundError | IsADirectoryError | NotADirectoryError):
            raise Refused(f"missing {what}", f"{path}: there is no such file") from None
        if isinstance(cause, PermissionError) or (isinstance(path, Path) and isinstance(cause, OSError) and cause.errno in _OF_THE_FILE):
            raise Refused(f"{what} that cannot be opened", str(error)) from None
        raise


def _from_data_uri(value: str) -> bytes:
    head, comma, body = value.partition(",")
    if not comma:
        raise Refused("broken data: URI", f"{_short(value)} has no comma")
    if not head.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise Refused("broken data: URI", f"{_short(value)}: {error}") from None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def parent(path: str) -> str:
    """Folder of a file or URL, as text."""
    return str(as_path(path).parent)


def below(folder: str, names: Iterator[str] | list[str]) -> list[str]:
    """Full addresses of files of a folder."""
    return [f"{folder.rstrip('/')}/{name}" for name in names]
