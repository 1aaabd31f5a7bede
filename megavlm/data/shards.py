"""Shards: plain WebDataset tar files holding `{key}.json` and the sample's pictures, written once and read by byte offset."""

from __future__ import annotations

import io
import os
import re
import tarfile
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from megavlm.data.images import measure_image
from megavlm.data.tokenizer import IMAGE_TOKEN

_KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_MAX_OPEN_SHARDS = 128


class ShardError(ValueError):
    """A shard or a sample in it that does not follow the format (docs/data.md)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Message(_Strict):
    """One turn. "<image>" in the content stands for the next picture of the sample."""

    role: Literal["system", "user", "assistant"]
    content: str


class ImageEntry(_Strict):
    """One picture of a sample."""

    file: str
    """Member of the same shard: `{key}.{index}.{extension}`."""
    width: int = Field(gt=0)
    """Pixels after EXIF rotation."""
    height: int = Field(gt=0)
    time_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Of a video's frame: seconds from its beginning."""


class ObjectEntry(_Strict):
    """A labelled box; what the vision_classification objective learns from."""

    image: int = Field(ge=0)
    """Index into the sample's images."""
    label: int = Field(ge=0)
    box_px: tuple[float, float, float, float]
    """x0, y0, x1, y1 in pixels of the picture after EXIF rotation; x1 and y1 are exclusive."""


class Sample(_Strict):
    """The JSON of one sample."""

    task: str = Field(min_length=1)
    split: str = Field(min_length=1)
    messages: list[Message] = Field(default_factory=list)
    images: list[ImageEntry] = Field(default_factory=list)
    weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    """Loss weight of the sample's targets."""
    objects: list[ObjectEntry] | None = None
    source: str = ""
    """Where the sample came from, for people and reports; plans go by data.sources."""
    scores: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)
    """Numbers about the sample (similarity, aesthetics, ...), for filtering."""
    meta: dict[str, Any] = Field(default_factory=dict)
    """Free; never read by training."""

    @model_validator(mode="after")
    def _check(self) -> Sample:
        marks = sum(m.content.count(IMAGE_TOKEN) for m in self.messages)
        if self.messages and marks != len(self.images):
            raise ValueError(f'the messages hold {marks} "{IMAGE_TOKEN}" but images has {len(self.images)} entries')
        for i, thing in enumerate(self.objects or []):
            if thing.image >= len(self.images):
                raise ValueError(f"objects[{i}].image={thing.image}, but the sample has {len(self.images)} images")
            x0, y0, x1, y1 = thing.box_px
            picture = self.images[thing.image]
            if not (0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height):
                raise ValueError(f"objects[{i}].box_px={list(thing.box_px)} is empty or outside its {picture.width}x{picture.height} image")
        return self


def parse_sample(text: bytes | str, where: str) -> Sample:
    """Sample from its JSON.

    Raises:
        ShardError: not JSON, a wrong or unknown field; names `where` and the fields.
    """
    try:
        return Sample.model_validate_json(text)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'sample'}: {e['msg']}" for e in error.errors()[:5])
        raise ShardError(f"{where}: {problems}") from error


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


class ShardWriter:
    """Write samples into `shard-00000.tar`, `shard-00001.tar`, ... of one folder.

    Use as a context manager: the shards take their names only when the block ends without an error, so that a reader never sees
    half a data set. The same samples give the same bytes.

    Args:
        folder: created when missing; must hold no shards.
        samples_per_shard: samples of each file but the last.

    Raises:
        ShardError: the folder already has shards; from `write`, an invalid key, sample or picture.
    """

    def __init__(self, folder: str | Path, samples_per_shard: int = 1000) -> None:
        if samples_per_shard < 1:
            raise ShardError(f"samples_per_shard={samples_per_shard} must be at least 1")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        present = shard_paths(self.folder)
        if present:
            raise ShardError(
                f"{folder} already holds {len(present)} shards ({present[0].name}, ...): choose an empty folder or delete them"
            )
        for stale in self.folder.glob(".shard-*.tar.partial"):
            stale.unlink()
        self.samples_per_shard = samples_per_shard
        self.num_samples = 0
        self._keys: set[str] = set()
        self._partial: list[Path] = []
        self._tar: tarfile.TarFile | None = None

    def write(self, key: str, sample: Mapping[str, Any], images: Sequence[bytes] = (), extensions: Sequence[str] | None = None) -> None:
        """Append one sample.

        Args:
            key: unique name; letters, digits, "-" and "_" (a dot would end the key in WebDataset's reading).
            sample: the JSON of docs/data.md. `images` may be left out: it is then filled in from the pictures.
            images: encoded pictures, stored untouched.
            extensions: one per picture, without dot; None: from each picture's format.
        """
        where = f"sample {key!r}"
        if not _KEY.fullmatch(key):
            raise ShardError(f"{where}: a key takes letters, digits, '-' and '_', and begins with a letter or digit")
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
            entries.append({"file": f"{key}.{i}.{extension}", "width": measured.width, "height": measured.height})
        if "images" in sample and [dict(e) for e in sample["images"]] != entries:
            raise ShardError(f"{where}: its images field says {list(sample['images'])}, the pictures say {entries}")
        checked = _validate({**sample, "images": entries}, where)
        self._keys.add(key)
        tar = self._current()
        _add(tar, f"{key}.json", checked.model_dump_json(exclude_defaults=True).encode())
        for entry, data in zip(entries, images, strict=True):
            _add(tar, str(entry["file"]), data)
        self.num_samples += 1

    def _current(self) -> tarfile.TarFile:
        if self._tar is None or self.num_samples % self.samples_per_shard == 0:
            if self._tar is not None:
                self._tar.close()
            path = self.folder / f".shard-{len(self._partial):05d}.tar.partial"
            self._partial.append(path)
            self._tar = tarfile.open(path, "w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 - closed with the shard
        return self._tar

    def close(self) -> None:
        """Finish the files and give them their names."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
        for path in self._partial:
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, self.folder / path.name.removeprefix(".").removesuffix(".partial"))
        self._partial = []

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        if self._tar is not None:
            self._tar.close()
        for path in self._partial:
            path.unlink(missing_ok=True)


def _validate(sample: Mapping[str, Any], where: str) -> Sample:
    try:
        return Sample.model_validate(dict(sample))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(str(p) for p in e['loc']) or 'sample'}: {e['msg']}" for e in error.errors()[:5])
        raise ShardError(f"{where}: {problems}") from error


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mtime = 0
    tar.addfile(info, io.BytesIO(data))


def shard_paths(folder: str | Path) -> list[Path]:
    """The folder's shards in order of name."""
    return sorted(Path(folder).glob("shard-*.tar"))


def scan_shard(path: Path) -> Iterator[RawSample]:
    """Samples of one shard in file order, from tar headers alone.

    Raises:
        ShardError: a broken tar file, a sample without JSON, a key that occurs twice, or a member that is not a plain file.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            group: dict[str, Member] = {}
            current: str | None = None
            seen: Counter[str] = Counter()
            for info in tar:
                if info.isdir():
                    continue
                if not info.isreg():
                    raise ShardError(f"{path.name}: member {info.name} is not a plain file")
                key = _key_of(info.name)
                if key != current:
                    if current is not None:
                        yield _group(path, current, group)
                    seen[key] += 1
                    if seen[key] > 1:
                        raise ShardError(f"{path.name}: the files of sample {key!r} are not together, or the key occurs twice")
                    current, group = key, {}
                group[info.name] = Member(info.name, info.offset_data, info.size)
            if current is not None:
                yield _group(path, current, group)
    except (tarfile.TarError, EOFError) as error:
        raise ShardError(f"{path} is not a whole tar file: {error}. Copy or write it again") from error


def _key_of(name: str) -> str:
    folder, _, base = name.rpartition("/")
    stem = base.split(".", 1)[0]
    return f"{folder}/{stem}" if folder else stem


def _group(path: Path, key: str, members: dict[str, Member]) -> RawSample:
    files = dict(members)
    text = files.pop(f"{key}.json", None)
    if text is None:
        raise ShardError(f"{path.name}: sample {key!r} has no {key}.json (its files: {', '.join(sorted(members))})")
    return RawSample(key, text, files)


class _OpenFile:
    """A read-only file descriptor, closed when nobody holds it any more: eviction cannot pull it from under a reading thread."""

    def __init__(self, path: Path) -> None:
        self.fd = -1
        self.fd = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


class ShardReader:
    """Random access into the shards of one folder by byte offset (os.pread). Thread-safe; keeps at most 128 files open.

    Raises:
        ShardError: from `read`, a missing shard or one that ends too early.
    """

    def __init__(self, folder: str | Path, names: Sequence[str]) -> None:
        self.folder = Path(folder)
        self.names = list(names)
        self._open: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, offset: int, size_bytes: int) -> bytes:
        """`size_bytes` bytes of shard number `shard`, from `offset` on."""
        file = self._file(shard)
        data = os.pread(file.fd, size_bytes, offset)
        while 0 < len(data) < size_bytes:  # one pread returns at most 2 GiB, and less on some network file systems
            more = os.pread(file.fd, size_bytes - len(data), offset + len(data))
            if not more:
                break
            data += more
        if len(data) != size_bytes:
            raise ShardError(
                f"{self.folder / self.names[shard]} ends before byte {offset + size_bytes}: it was cut or replaced after it was indexed"
            )
        return data

    def _file(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._open.pop(shard, None)
            if file is None:
                try:
                    file = _OpenFile(self.folder / self.names[shard])
                except OSError as error:
                    raise ShardError(f"cannot open shard {self.folder / self.names[shard]}: {error}") from error
            self._open[shard] = file
            while len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return file

    def close(self) -> None:
        """Forget all open files."""
        with self._lock:
            self._open.clear()
