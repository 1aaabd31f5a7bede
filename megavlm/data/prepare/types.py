"""The types of preparing: what was asked for, what a format yields, and how one sample is refused."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

DEFAULT_SAMPLES_PER_SHARD = 1000
NUM_EXAMPLES = 5
LEFT_OUT = "left-out"
"""First part of the payload of an entry that any format may yield: the rest are the fields of LeftOut."""


class PrepareError(ValueError):
    """An input or an option that nothing can be prepared from."""


class Refused(Exception):
    """One sample that is left out.

    Args:
        reason: short and the same for all samples of its kind; the report counts by it.
        detail: what is wrong with this one.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class LeftOut:
    """Parts of the input that are passed over because they are no samples; the report names and counts them as a note."""

    note: str
    """What they are; the report counts by it."""
    count: int
    examples: tuple[str, ...]
    """The first of them."""


@dataclass(frozen=True)
class PrepareOptions:
    """Everything that decides which bytes are written, and how."""

    format: str
    input: str
    """File or folder, local or a URL."""
    output: str
    """Folder of the shards, local or a URL."""
    images: str | None = None
    """Folder that relative names of pictures and videos begin at; None: the folder of the input."""
    task: str | None = None
    """None: the format's own."""
    split: str = "train"
    held_out_fraction: float = 0.0
    """Share of samples that goes to `held_out_split`, chosen by a hash of the first picture's bytes (of the text where there is none)."""
    held_out_split: str = "heldout"
    source: str | None = None
    """Written into each sample; None: the input's name."""
    columns: tuple[tuple[str, str], ...] = ()
    """(our name, name in the input) of fields that are called otherwise there."""
    prompt: str | None = None
    """Text of the user's turn beside the pictures; "{question}" and the like where the format says so."""
    samples_per_shard: int | None = None
    """Entries of the input per shard; None: the format's own."""
    annotations: str | None = None
    """vqa: the annotation file that goes with a VQAv2 question file."""
    answers: Literal["common", "all"] = "common"
    image_pattern: str | None = None
    """vqa: name of a picture from the fields of its question, as in "COCO_train2014_{image_id:012d}.jpg"."""
    directions: Literal["both", "to-box", "to-phrase"] = "both"
    notation: str | None = None
    """coco: how boxes are written, see megavlm.data.grounding; None: its first."""
    missing_pictures: Literal["refuse", "leave-out"] = "refuse"
    fps: float = 1.0
    """video, frames: frames kept per second."""
    input_fps: float = 1.0
    """frames: pictures per second in the folders."""
    max_frames: int = 64
    frame_format: Literal["jpg", "png"] = "jpg"
    workers: int = 1
    """Processes; 0: the calling one. Changes nothing in the output."""
    max_refused_fraction: float = 0.01
    """Above this share the shards stay unfinished. Changes nothing in the output."""

    @property
    def settings(self) -> dict[str, Any]:
        """What the bytes depend on: everything but where they go, how fast, and how much may be refused."""
        free = ("output", "workers", "max_refused_fraction")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}


SHARED_OPTIONS = frozenset(
    {
        *("format", "input", "output", "images", "task", "split", "held_out_fraction", "held_out_split", "source", "samples_per_shard"),
        *("workers", "max_refused_fraction"),
    }
)
"""Options that every format takes; the others are refused where they would change nothing."""


@dataclass(frozen=True)
class Entry:
    """One unit of the input, cheap to read and to send to another process: it holds no picture."""

    where: str
    """Address for messages: file and line, or file."""
    payload: Any
    """Plain Python values whose repr is the same every time."""


def left_out(where: str, note: str, names: Sequence[str], count: int | None = None) -> Entry:
    """The entry that tells of `names` (all of them, or the first of `count`)."""
    return Entry(where, (LEFT_OUT, note, len(names) if count is None else count, tuple(names[:NUM_EXAMPLES])))


@dataclass(frozen=True)
class Picture:
    """An encoded picture."""

    data: bytes
    time_s: float | None = None


@dataclass
class Draft:
    """A sample before it is checked."""

    messages: list[dict[str, str]]
    pictures: list[Picture] = field(default_factory=list)
    task: str | None = None
    """None: the format's."""
    split: str | None = None
    """What the input says; None: options decide."""
    source: str | None = None
    """What the input says; --source goes before it, None: the input's name."""
    objects: list[Any] | None = None
    weight: float = 1.0
    scores: dict[str, float] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    notes: dict[str, int] = field(default_factory=dict)
    """Counts of what was changed or left out inside the sample; the report adds them up."""


class Format(ABC):
    """One kind of input. Made once in the calling process (entries) and once in each worker (convert)."""

    name: ClassVar[str]
    help: ClassVar[str]
    default_task: ClassVar[str]
    options: ClassVar[frozenset[str]] = frozenset()
    """Names of PrepareOptions that it uses besides SHARED_OPTIONS."""
    fields: ClassVar[tuple[str, ...]] = ()
    """Names that --columns may map."""
    samples_per_shard: ClassVar[int] = DEFAULT_SAMPLES_PER_SHARD

    def __init__(self, asked: PrepareOptions) -> None:
        self.asked = asked
        self.columns = dict(asked.columns)

    def column(self, name: str) -> str:
        """What the input calls one of our fields."""
        return self.columns.get(name, name)

    @abstractmethod
    def entries(self) -> Iterator[tuple[Entry, float]]:
        """Entries in a fixed order, with the share of the input (0 to 1) that has been read."""

    @abstractmethod
    def convert(self, entry: Entry) -> Iterator[Draft | Refused | LeftOut]:
        """Samples of one entry. May raise Refused: then what is left of the entry is refused as one."""
