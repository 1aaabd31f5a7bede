"""Pictures of a microbatch dealt to the ranks that share it, by what each costs the encoder.

Everything follows from metadata that every rank has: all make the same deal, and nothing is communicated.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from megavlm.config.schema import ModelConfig, ParallelConfig, StageConfig
from megavlm.config.tensor_split import encoder_tensor_ranks, projector_tensor_ranks
from megavlm.planner.flops import FlopsModel, VisionWork
from megavlm.topology.table import text_table


class Picture(NamedTuple):
    """What one rank encodes as a whole: a tile, a picture in its own size, or all tiles of a picture that see each other."""

    tiles: int
    """How many of the batch's tiles it has; 1 for a picture in its own size."""
    work: VisionWork
    rows: int
    """Rows that the projector makes of it."""


@dataclass(frozen=True)
class PictureDeal:
    """Which rank takes which pictures."""

    pictures: tuple[Picture, ...]
    flops: tuple[int, ...]
    """Of each picture, forward and backward, encoder and projector."""
    shares: tuple[tuple[int, ...], ...]
    """[rank] -> numbers of its pictures, ascending; a rank may have none."""

    @cached_property
    def loads(self) -> tuple[int, ...]:
        """FLOPs of each rank."""
        return tuple(sum(self.flops[i] for i in share) for share in self.shares)

    @property
    def spared_flops(self) -> int:
        """FLOPs that the busiest rank has less than if it took all pictures."""
        return sum(self.loads) - max(self.loads)

    @property
    def idle_share(self) -> float:
        """Part of all ranks' time in which they wait for the busiest."""
        return 1.0 - sum(self.loads) / (max(self.loads) * len(self.loads)) if any(self.loads) else 0.0

    @cached_property
    def num_rows(self) -> tuple[int, ...]:
        """Projector rows of each rank."""
        return tuple(sum(self.pictures[i].rows for i in share) for share in self.shares)

    @cached_property
    def first_rows(self) -> tuple[int, ...]:
        """Where each picture's rows begin when all stand in the pack's order; one more at the end: how many there are."""
        return (0, *accumulate(picture.rows for picture in self.pictures))


def deal_pictures(costs: Sequence[float], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """[rank] -> indices of `costs`, ascending, so that the costliest rank is cheap.

    Longest processing time first (Graham 1969, SIAM J. Appl. Math. 17(2)): at most 4/3 of the best. Ties go to the lower index and rank.
    """
    shares: list[list[int]] = [[] for _ in range(num_ranks)]
    heap = [(0.0, rank) for rank in range(num_ranks)]
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        load, rank = heapq.heappop(heap)
        shares[rank].append(item)
        heapq.heappush(heap, (load + costs[item], rank))
    return tuple(tuple(sorted(share)) for share in shares)


class PictureDealer:
    """Deals pictures of one model to `num_ranks` ranks.

    `min_flops_per_byte` (parallel.encoder_min_flops_per_byte) leaves pictures undealt where that would not pay; None: always deal.
    `stage` says what trains, and so what a picture costs; None: everything.
    """

    def __init__(
        self,
        model: ModelConfig,
        num_ranks: int,
        element_bytes: int,
        min_flops_per_byte: float | None = None,
        stage: StageConfig | None = None,
    ) -> None:
        self.model, self.num_ranks, self.min_flops_per_byte = model, num_ranks, min_flops_per_byte
        # Rows go forward, and their gradients back to what trains.
        trains = stage is None or any(module.train != "frozen" for module in (stage.vision, stage.projector))
        self.row_bytes = (2 if trains else 1) * element_bytes * model.language.hidden_size * (1 + len(model.vision.deepstack_layers))
        self._flops = FlopsModel(model, stage)
        self._known: dict[VisionWork, int] = {}

    @classmethod
    def of(cls, model: ModelConfig, parallel: ParallelConfig, element_bytes: int, stage: StageConfig | None = None) -> PictureDealer | None:
        """As the recipe says; None where pictures are never dealt."""
        ranks = parallel.tensor * parallel.context
        if parallel.encoder_data_parallel is False or ranks == 1:
            return None
        limit = parallel.encoder_min_flops_per_byte if parallel.encoder_data_parallel == "auto" else None
        return cls(model, ranks, element_bytes, limit, stage)

    def deal(
        self, num_tiles: int, tile_grids: Sequence[tuple[int, int]] | None, tiles_per_picture: Sequence[int] | None
    ) -> PictureDeal | None:
        """The deal of a microbatch (fields of `PackedBatch`); None where every rank takes all pictures."""
        pictures = self.pictures(num_tiles, tile_grids, tiles_per_picture)
        flops = tuple(self.flops(picture) for picture in pictures)
        deal = PictureDeal(pictures, flops, deal_pictures(flops, self.num_ranks))
        if self.min_flops_per_byte is None:
            return deal
        return deal if deal.spared_flops >= max(self.min_flops_per_byte * deal.first_rows[-1] * self.row_bytes, 1) else None

    def flops(self, picture: Picture) -> int:
        """Forward and backward FLOPs of encoder and projector."""
        if picture.work not in self._known:
            self._known[picture.work] = self._flops.total((), picture.work, 0)
        return self._known[picture.work]

    def pictures(
        self, num_tiles: int, tile_grids: Sequence[tuple[int, int]] | None, tiles_per_picture: Sequence[int] | None
    ) -> tuple[Picture, ...]:
        """What is dealt, in the pack's order."""
        if tile_grids is not None:
            return tuple(Picture(1, VisionWork.of([r * c]), self.model.visual_tokens(r, c)) for r, c in tile_grids)
        patches, rows = self.model.vision.num_patches, self.model.visual_tokens_per_tile
        filled = self.model.vision.canvas_tiles
        if filled is None:
            return (Picture(1, VisionWork.uniform(1, patches), rows),) * num_tiles
        # Every picture is filled up to as many tiles, all of which see each other.
        counts = tiles_per_picture if tiles_per_picture is not None else [1] * num_tiles
        works = [VisionWork(tiles, filled * patches, (filled * patches) ** 2) for tiles in counts]
        return tuple(Picture(tiles, work, filled * rows) for tiles, work in zip(counts, works, strict=True))


def copies_of_pictures(model: ModelConfig, parallel: ParallelConfig) -> dict[str, int]:
    """Of the tensor x context ranks that share a microbatch, how many do all of the same work: part of the model -> number.

    Context ranks all see every picture, and so do tensor ranks of a module that is whole on each. Dealt pictures are no work done twice;
    with encoder_data_parallel=auto those of microbatches that stay undealt are, and are not counted.
    """
    if parallel.encoder_data_parallel is not False:
        return {"vision": 1, "projector": 1}
    ranks = parallel.tensor * parallel.context
    return {"vision": ranks // encoder_tensor_ranks(model, parallel), "projector": ranks // projector_tensor_ranks(model, parallel)}


def encoder_layout_table(model: ModelConfig, parallel: ParallelConfig, deals: Sequence[PictureDeal | None]) -> str:
    """How encoder and projector lie on the ranks that share a microbatch, as text for --dry-run; `deals` are those of a step's
    microbatches with pictures, empty where none are ever dealt."""
    ranks = parallel.tensor * parallel.context
    lies = [
        f"{name} {'whole on every rank' if own == 1 else f'split over {own} tensor ranks'}"
        for name, own in (("encoder", encoder_tensor_ranks(model, parallel)), ("projector", projector_tensor_ranks(model, parallel)))
    ]
    title = f"{ranks} ranks share a microbatch: {', '.join(lies)}"
    if parallel.encoder_data_parallel is False:
        return f"{title}; every one of them works on all pictures"
    dealt = [deal for deal in deals if deal is not None]
    longest, work = sum(max(deal.loads) for deal in dealt), sum(sum(deal.loads) for deal in dealt)
    row = (
        len(deals),
        len(dealt),
        f"{sum(len(deal.pictures) for deal in dealt) / max(len(dealt), 1):.1f}",
        f"{100 * longest / max(work, 1):.0f} %",
        f"{100 * (1 - work / max(longest * ranks, 1)):.0f} %",
    )
    header = ("microbatches with pictures", "dealt", "pictures in each", "busiest rank encodes", "ranks idle")
    return text_table(header, [row], title)
