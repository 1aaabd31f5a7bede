"""Where the files of a shard lie, from its tar headers alone."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

from megavlm.data.sample import ShardError
from megavlm.data.storage import AnyPath, StorageError, as_path, open_read

_BLOCK_BYTES = 512
_EMPTY = bytes(_BLOCK_BYTES)


@dataclass(frozen=True)
class Member:
    """Where one file lies inside a shard."""

    name: str
    offset: int
    """First byte of its content in the tar file."""
    size_bytes: int


@dataclass(frozen=True)
class RawSample:
    """The members of one sample."""

    key: str
    json: Member
    files: dict[str, Member]
    """All other members by name."""
    text: bytes | None = None
    """The JSON itself, where the scan was asked to read it."""


def scan_shard(path: AnyPath, with_json: bool = False) -> Iterator[RawSample]:
    """Samples of one shard in file order, from tar headers alone; `with_json` also reads each sample's JSON.

    Raises:
        ShardError: a broken tar file, a sample without JSON, a key that occurs twice, or a member that is not a plain file
            or whose name is not UTF-8.
    """
    path = as_path(path)
    try:
        with open_read(path) as file:
            group: dict[str, Member] = {}
            current: str | None = None
            seen: set[str] = set()
            for member in _members(file, str(path)):
                if not member.name.isascii():
                    _check_name(path.name, member.name)
                key = _key_of(member.name)
                if key != current:
                    if current is not None:
                        yield _group(file, path.name, current, group, with_json)
                    if key in seen:
                        raise ShardError(f"{path.name}: the files of sample {key!r} are not together, or the key occurs twice")
                    seen.add(key)
                    current, group = key, {}
                group[member.name] = member
            if current is not None:
                yield _group(file, path.name, current, group, with_json)
    except StorageError as error:
        raise ShardError(f"cannot open shard {error}") from error
    except OSError as error:
        raise ShardError(f"cannot read shard {path}: {error}") from error


def _group(file: IO[bytes], shard: str, key: str, members: dict[str, Member], with_json: bool) -> RawSample:
    files = dict(members)
    found = files.pop(f"{key}.json", None)
    if found is None:
        raise ShardError(f"{shard}: sample {key!r} has no {key}.json (its files: {', '.join(sorted(members))})")
    if not with_json:
        return RawSample(key, found, files)
    file.seek(found.offset)
    return RawSample(key, found, files, file.read(found.size_bytes))


def _check_name(shard: str, name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        shown = name.encode("utf-8", "surrogateescape")
        raise ShardError(f"{shard}: the name of member {shown!r} is not UTF-8: write the shard again with such names") from error


def _key_of(name: str) -> str:
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def _members(file: IO[bytes], where: str) -> Iterator[Member]:
    """Plain files of a tar archive in order.

    Plain headers (what ShardWriter makes) are read here, some five times as fast as by `tarfile`; at the first header of another kind
    (long names, PAX records) `tarfile` takes over from there.

    Raises:
        ShardError: a broken header, a member that is not a plain file, or an archive without its end mark: it was cut.
    """
    size = file.seek(0, 2)
    position = 0
    while True:
        file.seek(position)
        header = file.read(_BLOCK_BYTES)
        if len(header) < _BLOCK_BYTES:
            raise _broken(where, f"it ends at byte {size} without the end mark of a tar file")
        if header == _EMPTY:
            return
        kind, digits = header[156:157], header[124:136]
        if kind not in (b"0", b"\0", b"5") or digits[0] & 0x80 or (header[345] and header[257:263] == b"ustar\0"):
            yield from _other_members(file, where, position, size)
            return
        try:
            member_bytes = int(digits.rstrip(b" \0") or b"0", 8)
            right = int(header[148:156].strip(b" \0"), 8) == sum(header) - sum(header[148:156]) + 256
        except ValueError:
            right, member_bytes = False, 0
        if not right:
            raise _broken(where, f"the header at byte {position} has a wrong checksum")
        start = position + _BLOCK_BYTES
        if start + member_bytes > size:
            raise _broken(where, f"it ends at byte {size}, inside a member")
        if kind != b"5":
            yield Member(_decoded(header[:100]), start, member_bytes)
        position = start + -(-member_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _decoded(name: bytes) -> str:
    return name.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _broken(where: str, why: str) -> ShardError:
    return ShardError(f"{where} is not a whole tar file: {why}. Copy or write it again")


def _other_members(file: IO[bytes], where: str, position: int, size: int) -> Iterator[Member]:
    file.seek(position)
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined] # it would keep every header
                if info.isdir():
                    continue
                if not info.isreg():
                    raise ShardError(f"{where}: member {info.name} is not a plain file")
                if info.offset_data + info.size > size:
                    raise _broken(where, f"it ends at byte {size}, inside {info.name}")
                yield Member(info.name, info.offset_data, info.size)
            file.seek(tar.offset)
            if file.read(_BLOCK_BYTES) != _EMPTY:
                raise _broken(where, f"no end mark of a tar file stands at byte {tar.offset}")
    except (tarfile.TarError, EOFError) as error:
        raise _broken(where, str(error)) from error
