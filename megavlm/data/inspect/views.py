"""What the page shows, as plain values: no tensor, no tokenizer, no HTML."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TokenKind = Literal["context", "target", "muted", "visual"]
"""context: read, not predicted. target: predicted, in the loss. muted: predicted with weight 0. visual: replaced by features."""


@dataclass(frozen=True)
class TokenPiece:
    """The text of one token; of several where a character is spread over them."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class TokenRun:
    """Neighbouring tokens of one kind."""

    kind: TokenKind
    count: int
    pieces: tuple[TokenPiece, ...] = ()
    """Empty for visual tokens."""


@dataclass(frozen=True)
class Frame:
    """Where the grid lies over the original picture, in parts of its width and height: (0, 0, 1, 1) is the whole of it."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class PictureView:
    """One picture of a sample and what the encoder gets of it."""

    file: str
    width: int
    height: int
    """Pixels of the original, upright."""
    time_s: float | None
    original: str | None
    """data: URI; None when it could not be read."""
    frame: Frame
    cols: int
    rows: int
    """Of the grid: tiles, or patches with native resolution."""
    unit: Literal["tile", "patch"]
    resized_px: tuple[int, int]
    """Width and height of the whole grid in pixels."""
    tokens: int
    tiles: tuple[str, ...]
    """data: URIs of what the encoder gets, in its order; native resolution: one, the whole picture."""
    thumbnail: Literal["none", "first", "last"]
    labels: tuple[tuple[int, ...], ...] = ()
    """vision_classification: class of each patch of the tile, row by row."""
    background: int = -1
    """The class that is no object."""


@dataclass(frozen=True)
class SampleView:
    """One sample of a pack, from metadata; with what was read of it where the pack is shown in detail."""

    source: str
    row: int
    key: str
    task: str
    length: int
    targets: int
    tiles: int
    patches: int
    weight: float | None = None
    """Sum of its targets' loss weights / their number; None where nothing was read."""
    problem: str | None = None
    """Why it could not be read."""
    where: str = ""
    runs: tuple[TokenRun, ...] = ()
    pictures: tuple[PictureView, ...] = ()


@dataclass(frozen=True)
class Cost:
    """FLOPs forward and backward, split where the work is."""

    vision: float
    """Encoder and projector."""
    language: float

    @property
    def total(self) -> float:
        return self.vision + self.language

    @property
    def vision_share(self) -> float:
        """0 where nothing is computed."""
        return self.vision / self.total if self.total else 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.vision + other.vision, self.language + other.language)


@dataclass(frozen=True)
class PackView:
    """One pack and its place."""

    rank: int
    microbatch: int
    place: int
    """Among the packs of its microbatch."""
    samples: tuple[SampleView, ...]
    capacity: int
    """Tokens (vision_classification: pictures) that it can hold."""
    used: int
    patches: int
    targets: int
    cost: Cost
    mask: str | None = None
    """data: URI of the attention mask; None where the pack is not shown in detail."""

    @property
    def is_detailed(self) -> bool:
        return self.mask is not None

    @property
    def fill(self) -> float:
        return self.used / self.capacity


@dataclass(frozen=True)
class Share:
    """One source of the mixture."""

    source: str
    target: float
    """Share of samples that the recipe asks for at this step."""
    in_step: int
    """Samples of it in this step's packs."""
    drawn: int
    """Samples drawn from it since the stage began, those that wait included."""
    rows: int
    """Samples that it has."""


@dataclass(frozen=True)
class StepView:
    """Everything on the page."""

    recipe: str
    stage: str
    objective: str
    step: int
    num_steps: int
    dp_size: int
    num_microbatches: int
    packs: tuple[PackView, ...]
    shares: tuple[Share, ...]
    statistics: dict[str, float]
    settings: dict[str, str] = field(default_factory=dict)
    """Recipe fields that explain what is seen."""

    @property
    def detailed(self) -> list[PackView]:
        return [pack for pack in self.packs if pack.is_detailed]

    @property
    def classifies(self) -> bool:
        """Packs hold pictures with labelled patches, not tokens."""
        return self.objective == "vision_classification"

    @property
    def sources(self) -> list[str]:
        return [share.source for share in self.shares]

    @property
    def tasks(self) -> list[str]:
        return sorted({sample.task for pack in self.packs for sample in pack.samples})

    @property
    def has_groups(self) -> bool:
        """A microbatch holds several packs."""
        return any(pack.place for pack in self.packs)

    def rank_fill(self) -> list[float]:
        """Of each rank's packs together."""
        used, capacity = [0] * self.dp_size, [0] * self.dp_size
        for pack in self.packs:
            used[pack.rank] += pack.used
            capacity[pack.rank] += pack.capacity
        return [u / c for u, c in zip(used, capacity, strict=True)]

    def rank_costs(self) -> list[list[Cost]]:
        """[rank][microbatch] -> cost."""
        costs = [[Cost(0.0, 0.0) for _ in range(self.num_microbatches)] for _ in range(self.dp_size)]
        for pack in self.packs:
            costs[pack.rank][pack.microbatch] += pack.cost
        return costs

    @property
    def idle(self) -> float:
        """Share of all ranks' time that is spent waiting for the busiest, if time goes with FLOPs."""
        totals = [sum(cost.total for cost in rank) for rank in self.rank_costs()]
        return 1 - sum(totals) / (max(totals) * len(totals)) if max(totals) else 0.0
