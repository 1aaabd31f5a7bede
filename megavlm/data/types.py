"""The types between the steps of the data's route; they are the architecture.

Shape legend: S packed sequence, N visual tokens, T tiles, C channels, Q targets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch

from megavlm.planner.flops import VisionWork


@dataclass(frozen=True)
class SampleRef:
    """One sample, named so that a person can find it again."""

    source: str
    """Key in recipe.data.sources."""
    row: int
    """Row in that source's SampleIndex."""


@dataclass(frozen=True)
class PackPlan:
    """Samples that share one sequence, in order. Computed from metadata alone."""

    samples: tuple[SampleRef, ...]
    lengths_tokens: tuple[int, ...]
    """Exact length of each sample, visual tokens included; their sum is at most data.seq_len_tokens."""
    vision: VisionWork
    """Tiles and patches of all pictures."""
    num_targets: int
    flops: float
    """Forward + backward estimate; used to balance ranks."""

    @property
    def num_tiles(self) -> int:
        """Tiles (native resolution: pictures) of the pack."""
        return self.vision.tiles


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step: which pack goes to which data-parallel rank and microbatch, and where the data stand after it."""

    step: int
    assignment: tuple[tuple[tuple[PackPlan, ...], ...], ...]
    """[data-parallel rank][microbatch] -> packs of that microbatch."""
    cursor_after: dict[str, object]
    """JSON-serialisable state from which the next step is planned."""
    statistics: dict[str, float] = field(default_factory=dict)
    """How well the step is packed and balanced; names and units in `megavlm.data.plan.StepPlanner`."""


class PictureTiles(NamedTuple):
    """How a picture was cut."""

    tiles: int
    """All of them, the thumbnail too."""
    rows: int
    columns: int


@dataclass
class PackedBatch:
    """One microbatch: one or several packs laid end to end. Text-only, one image, many tiles and video are all this type.

    A segment is one sample (or the padding at a pack's end, which has no target). Attention stays inside a segment and
    positions restart with each. `target_positions` name the rows whose hidden state predicts `target_ids`: the token after.
    For the vision_classification objective there are no tokens: rows are the patches of all tiles in order, S = T x patches.
    """

    tokens_S: torch.Tensor
    """int64; placeholders hold the image token's id, one per visual token."""
    positions_S: torch.Tensor
    """int64; restart at 0 with each segment."""
    segment_lengths: list[int]
    """Lengths of all segments in order, padding included; they add up to S."""
    segment_samples: list[SampleRef | None]
    """One per segment; None for padding."""
    segment_tasks: list[str]
    """Task name of each segment, "" for padding."""
    target_positions_Q: torch.Tensor
    """int64, ascending."""
    target_ids_Q: torch.Tensor
    """int64."""
    target_weights_Q: torch.Tensor
    """float32; loss weight of each target, 0 for samples that could not be read."""
    target_segments_Q: torch.Tensor
    """int64; segment that each target belongs to."""
    image_positions_N: torch.Tensor
    """int64, ascending; rows of tokens_S that visual features replace, tile after tile."""
    num_tiles: int
    """Tiles of this microbatch (native resolution: pictures); known to every rank."""
    tiles_TCHW: torch.Tensor | None = None
    """uint8; None on ranks without an encoder, where num_tiles is 0 and with native resolution."""
    pixels_X: torch.Tensor | None = None
    """uint8, native resolution only: all pictures one after another, each (C, H, W) flattened. None as tiles_TCHW."""
    tile_grids: list[tuple[int, int]] | None = None
    """Native resolution only: (rows, columns) of patches of each picture; known to every rank."""
    picture_tiles: list[PictureTiles] | None = None
    """Of each picture, in order; known to every rank. None: native resolution, or no picture."""
    feature_rows_N: torch.Tensor | None = None
    """int64: which row of the projector's output each visual token takes; -1 is the learned end of a row. None: all rows in order.
    (N, 4) where tokens mix rows: see megavlm.data.blends."""
    instruction_ids_W: torch.Tensor | None = None
    """int64; tokens, in the projector's own vocabulary, of the text that goes with each picture, end to end (InstructBLIP)."""
    instruction_lengths: list[int] | None = None
    """How many of them each picture has."""
    own_pictures: tuple[int, ...] | None = None
    """Where pictures are dealt to ranks (planner/pictures.py): those whose pixels and instructions are here; all else tells of all
    pictures. None: they are all here."""
    host_image_positions_N: torch.Tensor | None = None
    """image_positions_N as `to` found them in host memory: what is built there must not wait for the device. None: never moved."""
    num_bad_samples: int = 0
    metadata: dict[str, object] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """S, padding included."""
        return int(self.tokens_S.numel())

    @property
    def num_useful_tokens(self) -> int:
        """Tokens that belong to a sample."""
        return sum(n for n, s in zip(self.segment_lengths, self.segment_samples, strict=True) if s is not None)

    @property
    def image_rows_N(self) -> torch.Tensor:
        """image_positions_N, without a halt where the batch came from host memory."""
        return self.image_positions_N if self.host_image_positions_N is None else self.host_image_positions_N

    def to(self, device: torch.device | str) -> PackedBatch:
        """Copy with every tensor on `device`."""
        tensors = {f.name: value for f in fields(self) if isinstance(value := getattr(self, f.name), torch.Tensor)}
        moved: dict[str, Any] = {name: value.to(device, non_blocking=True) for name, value in tensors.items()}
        return replace(self, **{**moved, "host_image_positions_N": self.image_rows_N})


@dataclass
class StepData:
    """What one rank trains on in one step."""

    microbatches: list[PackedBatch]
    plan: StepPlan
    wait_s: float
    """Seconds the training thread waited for this step's data."""
