"""One chunk of entries -> one tar and one line of the journal; runs in any process and always gives the same bytes."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import IO, Any

from megavlm.data.images import ImageError, measure_image
from megavlm.data.prepare.files import stem
from megavlm.data.prepare.formats import FORMATS
from megavlm.data.prepare.types import LEFT_OUT, Draft, Entry, Format, LeftOut, PrepareOptions, Refused
from megavlm.data.sample import ShardError, check_sample
from megavlm.data.storage import AnyPath, as_path, open_write, read_bytes, stamp, write_bytes

MAX_EXAMPLES = 5
STAGING = ".prepare"
_HASH_RANGE = 1 << 64


@dataclass
class Refusals:
    """How many samples were refused for one reason, and the first of them."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, count: int, examples: Iterable[str]) -> None:
        """Count more; only the first examples are kept."""
        self.count += count
        self.examples += list(examples)[: MAX_EXAMPLES - len(self.examples)]


@dataclass
class Tally:
    """Counts of one chunk, or of many."""

    entries: int = 0
    written: int = 0
    refused: dict[str, Refusals] = field(default_factory=dict)
    notes: Counter[str] = field(default_factory=Counter)
    """Of what was left out that is no sample, or part of one."""
    note_examples: dict[str, list[str]] = field(default_factory=dict)
    tasks: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    pictures: int = 0
    size_bytes: int = 0
    """Of the tar files."""

    @property
    def num_refused(self) -> int:
        return sum(r.count for r in self.refused.values())

    @property
    def read(self) -> int:
        """Samples that were looked at: written + refused."""
        return self.written + self.num_refused

    def refuse(self, where: str, refused: Refused) -> None:
        """Count one."""
        self.refused.setdefault(refused.reason, Refusals()).add(1, [f"{where}: {refused.detail}"])

    def leave_out(self, left: LeftOut) -> None:
        """Count what is no sample."""
        self.notes[left.note] += left.count
        self._show(left.note, left.examples)

    def _show(self, note: str, examples: Sequence[str]) -> None:
        shown = self.note_examples.setdefault(note, [])
        shown += examples[: MAX_EXAMPLES - len(shown)]

    def add(self, other: Tally) -> None:
        """Add the counts of what comes after."""
        for reason, more in other.refused.items():
            self.refused.setdefault(reason, Refusals()).add(more.count, more.examples)
        for note, examples in other.note_examples.items():
            self._show(note, examples)
        for name in ("entries", "written", "pictures", "size_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("notes", "tasks", "splits"):
            getattr(self, name).update(getattr(other, name))

    def values(self) -> dict[str, Any]:
        """As plain JSON."""
        plain = {name: getattr(self, name) for name in ("entries", "written", "pictures", "size_bytes")}
        counters = {name: dict(getattr(self, name)) for name in ("notes", "tasks", "splits")}
        return {
            **plain,
            **counters,
            "note_examples": self.note_examples,
            "refused": {reason: asdict(r) for reason, r in self.refused.items()},
        }

    @classmethod
    def of(cls, values: dict[str, Any]) -> Tally:
        """From the JSON of `values`."""
        counters = {n: Counter(values[n]) for n in ("notes", "tasks", "splits")}
        return cls(**{**values, **counters, "refused": {k: Refusals(**v) for k, v in values["refused"].items()}})


@dataclass(frozen=True)
class ChunkDone:
    """A line of the journal."""

    digest: str
    """Of the chunk's entries."""
    tally: Tally


def tar_path(output: str, number: int) -> AnyPath:
    """Where a chunk's tar waits for its final name."""
    return as_path(output) / STAGING / f"chunk-{number:06d}.tar"


def journal_path(output: str, number: int) -> AnyPath:
    """Where a chunk is written down as done."""
    return as_path(output) / STAGING / f"chunk-{number:06d}.json"


def entries_digest(entries: list[Entry]) -> str:
    """Hash of what the input says, to notice that it changed between two calls."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(repr((entry.where, entry.payload)).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def read_journal(output: str, number: int) -> ChunkDone:
    """A chunk that is done."""
    values = json.loads(read_bytes(journal_path(output, number)))
    return ChunkDone(values["digest"], Tally.of(values["tally"]))


@lru_cache(maxsize=4)
def make_format(options: PrepareOptions) -> Format:
    """The format's object, one a process."""
    return FORMATS[options.format](options)


def convert_chunk(options: PrepareOptions, number: int, first: int, entries: list[Entry]) -> Tally:
    """Write the tar of one chunk and then its line of the journal.

    Args:
        number: of the chunk.
        first: number of its first entry in the whole input; sample keys come from it.
    """
    kind, tally = make_format(options), Tally(entries=len(entries))
    path = tar_path(options.output, number)
    with ExitStack() as stack:
        tar: tarfile.TarFile | None = None
        for position, entry in enumerate(entries):
            for part, draft in enumerate(_drafts(kind, entry)):
                if isinstance(draft, LeftOut):
                    tally.leave_out(draft)
                    continue
                try:
                    if isinstance(draft, Refused):
                        raise draft
                    key = f"{first + position:09d}" + (f"-{part}" if part else "")
                    members = _members(key, draft, options, kind, tally)
                except Refused as refused:
                    tally.refuse(entry.where, refused)
                    continue
                if tar is None:  # a chunk without a sample leaves no file
                    file: IO[bytes] = stack.enter_context(open_write(path))
                    tar = stack.enter_context(tarfile.open(fileobj=file, mode="w", format=tarfile.GNU_FORMAT))
                for name, data in members:
                    _add(tar, name, data)
    if tally.written:
        tally.size_bytes = stamp(path).size_bytes
    line = {"digest": entries_digest(entries), "tally": tally.values()}
    write_bytes(journal_path(options.output, number), json.dumps(line).encode())
    return tally


def _drafts(kind: Format, entry: Entry) -> Iterator[Draft | Refused | LeftOut]:
    try:
        if isinstance(entry.payload, tuple) and entry.payload[0] == LEFT_OUT:
            yield LeftOut(*entry.payload[1:])
        else:
            yield from kind.convert(entry)
    except Refused as refused:
        yield refused


def _members(key: str, draft: Draft, options: PrepareOptions, kind: Format, tally: Tally) -> list[tuple[str, bytes]]:
    """Files of one sample, its JSON first; counts it. Raises Refused."""
    images, files = [], []
    for i, picture in enumerate(draft.pictures):
        try:
            measured = measure_image(picture.data)
        except ImageError as error:
            raise Refused("unreadable picture", f"picture {i}: {error}") from None
        name = f"{key}.{i}.{measured.extension}"
        entry = {"file": name, "width": measured.width, "height": measured.height, "time_s": picture.time_s}
        images.append({**entry, "sha256": hashlib.sha256(picture.data).hexdigest()})
        files.append((name, picture.data))
    fields = {
        "task": options.task or draft.task or kind.default_task,
        "split": draft.split or _split(draft, options),
        "messages": draft.messages,
        "images": images,
        "weight": draft.weight,
        "objects": draft.objects,
        "source": next(name for name in (options.source, draft.source, stem(options.input)) if name is not None),
        "scores": draft.scores,
        "meta": draft.meta,
    }
    try:
        sample = check_sample(fields, f"sample {key}")
        text = sample.model_dump_json(exclude_defaults=True).encode()
    except ShardError as error:
        raise Refused("fields that do not fit", str(error)) from None
    except (ValueError, UnicodeEncodeError) as error:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        raise Refused("text that is not Unicode", str(error)) from None
    tally.written += 1
    tally.pictures += len(files)
    tally.tasks[sample.task] += 1
    tally.splits[sample.split] += 1
    tally.notes.update(draft.notes)
    return [(f"{key}.json", text), *files]


def _split(draft: Draft, options: PrepareOptions) -> str:
    """By the first picture's bytes (or the text): samples of one picture stay together, in whatever file or order they come."""
    if not options.held_out_fraction:
        return options.split
    content = draft.pictures[0].data if draft.pictures else json.dumps(draft.messages).encode()
    place = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return options.held_out_split if place < options.held_out_fraction * _HASH_RANGE else options.split


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))
