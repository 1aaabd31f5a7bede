"""What preparing needs of files beyond megavlm.data.storage: walking folders, moving and deleting, and pictures by any name."""

from __future__ import annotations

import base64
import binascii
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from megavlm.data.prepare.types import PrepareError, Refused
from megavlm.data.storage import AnyPath, StorageError, StoragePath, Url, as_path, read_bytes

PICTURE_SUFFIXES = frozenset({"jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"})


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

    Raises:
        PrepareError: there is no such folder.
    """
    place = as_path(folder)
    if isinstance(place, Path):
        if not place.is_dir():
            raise PrepareError(f"{place}: there is no such folder")
        found = []
        for here, folders, names in os.walk(place, followlinks=True):
            folders[:] = [f for f in folders if not f.startswith(".")]
            base = os.path.relpath(here, place)
            found += [name if base == "." else f"{base}/{name}" for name in names if not name.startswith(".")]
        return sorted(found)
    files, inner = _remote(place)
    inner = inner.rstrip("/") + "/"
    names = [str(n)[len(inner) :] for n in files.find(inner) if str(n).startswith(inner)]
    if not names:
        raise PrepareError(f"{place}: there is no such folder, or it is empty")
    return sorted(n for n in names if not any(part.startswith(".") for part in n.split("/")))


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
    begin at `root` when they are relative.
    """

    def __init__(self, root: str | None) -> None:
        self.root = root

    def load(self, value: Any) -> bytes:
        """Raises Refused when there is no such picture, or when its address means nothing here."""
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path") or value.get("url")
        if isinstance(value, bytes | bytearray):
            return bytes(value)
        if not isinstance(value, str) or not value or "\0" in value:
            raise Refused("picture without address", f"{_short(value)} is neither a path, a URL nor bytes")
        if value.startswith("data:"):
            return _from_data_uri(value)
        if value.startswith(("http://", "https://")):
            raise Refused("picture on the web", f"{_short(value)}: fetch the pictures first, and give --images")
        path = self.find(value)
        try:
            return read_bytes(path)
        except StorageError as error:
            cause = error.__cause__
            if isinstance(cause, FileNotFoundError | IsADirectoryError | NotADirectoryError):
                raise Refused("missing picture", f"{path}: there is no such file") from None
            if isinstance(cause, PermissionError) or (isinstance(cause, OSError) and "name too long" in str(cause)):
                raise Refused("picture that cannot be opened", str(error)) from None
            raise

    def find(self, name: str) -> StoragePath:
        """Address of a picture or video."""
        if "://" in name or name.startswith("/") or not self.root:
            return as_path(name)
        root = as_path(self.root)
        return root / name if isinstance(root, Path) else Url(f"{root.text}/{name}")


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
