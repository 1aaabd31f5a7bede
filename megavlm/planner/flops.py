"""Floating-point operations of a pack, exactly, from metadata alone.

A multiply-add counts 2. Counted are the matrix products (as torch.utils.flop_counter counts them); norms, activations, rotary
positions and the softmax are not. Attention is counted on the real segments: 4 L^2 H K a layer for a segment of L tokens (scores
and weighted sum), half of it where the mask is causal (the convention of PaLM, arXiv 2204.02311, appendix B, and of Dao et al.'s
flash-attention benchmarks). The head runs on target positions only.

Backward: a matrix product costs its forward once for the gradient of its input, where anything below it trains, and once for the
gradient of its weight, where that trains; attention costs twice its forward. Below the lowest trainable module nothing is counted:
a frozen encoder has no backward, while a projector alone still needs the LLM's input gradients. Recomputation is not counted: these
are the FLOPs that the mathematics needs, the numerator of MFU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from megavlm.config.schema import ModelConfig, StageConfig
from megavlm.planner.parameters import objective_of
from megavlm.planner.products import UNITS, Product, products
from megavlm.planner.recompute import Again


class VisionWork(NamedTuple):
    """What pictures cost the encoder. A tile, or with native resolution a whole picture, is one segment of its attention."""

    tiles: int = 0
    patches: int = 0
    """Over all tiles."""
    patch_pairs: int = 0
    """Sum over tiles of the square of their patches."""
    looks: int = 0
    """Rows of text times the features that each sees, where layers of the LLM read pictures (model.language.cross_attention)."""

    @classmethod
    def of(cls, patches_per_tile: Iterable[int]) -> VisionWork:
        """Work of tiles with so many patches each."""
        sizes = list(patches_per_tile)
        return cls(len(sizes), sum(sizes), sum(n * n for n in sizes))

    @classmethod
    def uniform(cls, tiles: int, patches_per_tile: int) -> VisionWork:
        """Work of equal tiles."""
        return cls(tiles, tiles * patches_per_tile, tiles * patches_per_tile**2)

    @classmethod
    def total(cls, parts: Iterable[VisionWork]) -> VisionWork:
        """Sum of several (`+` of tuples would join them)."""
        columns = list(zip(*parts, strict=True))
        return cls(*(sum(column) for column in columns)) if columns else cls()


@dataclass(frozen=True)
class Work:
    """FLOPs of one part."""

    forward: int = 0
    backward: int = 0

    @property
    def total(self) -> int:
        return self.forward + self.backward

    def __add__(self, other: Work) -> Work:
        return Work(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> Work:
        return Work(self.forward * times, self.backward * times)


@dataclass(frozen=True)
class PackFlops:
    """FLOPs of one pack, and of its parts: vision.embedding, vision.linear, vision.attention, vision.head, projector,
    language.linear, language.attention, language.cross_attention, language.head."""

    by_part: dict[str, Work] = field(default_factory=dict)

    @property
    def forward(self) -> int:
        return sum(work.forward for work in self.by_part.values())

    @property
    def backward(self) -> int:
        return sum(work.backward for work in self.by_part.values())

    @property
    def total(self) -> int:
        return self.forward + self.backward


class FlopsModel:
    """The cost of packs under one model and stage, ready to be asked many times.

    `stage=None` means that everything trains (a benchmark of the whole model).
    """

    def __init__(self, model: ModelConfig, stage: StageConfig | None = None) -> None:
        self._pooled = model.vision.pooled
        self._kept_class_tokens = int(model.vision.class_token and model.vision.keep_class_token)
        self._patches_per_place = model.vision.num_patches if model.vision.canvas is not None else None
        self._patches_per_feature = model.projector.pixel_shuffle**2
        self._products = list(products(model, stage))
        self._objective = objective_of(model, stage)
        self._forward: dict[str, dict[str, int]] = {}
        self._backward: dict[bool, dict[str, dict[str, int]]] = {False: {}, True: {}}
        for product in self._products:
            _accumulate(self._forward, product, product.flops)
            for has_tiles in (False, True):
                _accumulate(self._backward[has_tiles], product, product.backward(has_tiles))
        self._total = {has_tiles: self._coefficients(has_tiles) for has_tiles in (False, True)}
        self._again: dict[tuple[bool, Again], list[list[float]]] = {}
        self._num_layers = model.language.num_layers
        self._depths: dict[bool, list[tuple[_Coefficients, _Coefficients]]] = {
            has_tiles: _by_depth(self._products, self._num_layers, has_tiles) for has_tiles in (False, True)
        }

    def total(self, lengths: Iterable[int], work: VisionWork, num_targets: int) -> int:
        """Forward + backward FLOPs of a pack of segments of `lengths` tokens; the cheap form for planning."""
        amounts = self._amounts(lengths, work, num_targets)
        return sum(flops * amount for flops, amount in zip(self._total[work.tiles > 0], amounts, strict=True))

    def pack(self, lengths: Iterable[int], work: VisionWork, num_targets: int) -> PackFlops:
        """FLOPs of a pack, part by part."""
        amounts = dict(zip(UNITS, self._amounts(lengths, work, num_targets), strict=True))
        backward = self._backward[work.tiles > 0]
        return PackFlops(
            {
                part: Work(
                    sum(flops * amounts[unit] for unit, flops in units.items()),
                    sum(flops * amounts[unit] for unit, flops in backward[part].items()),
                )
                for part, units in self._forward.items()
            }
        )

    def by_depth(self, lengths: Iterable[int], work: VisionWork, num_targets: int) -> list[Work]:
        """FLOPs of a pack from the bottom of the model to its top: what stands before the LLM's layers (encoder, projector), each of
        these layers, and what stands behind them (head). For pipeline stages."""
        amounts = self._amounts(lengths, work, num_targets)
        return [
            Work(*(sum(flops * amount for flops, amount in zip(way, amounts, strict=True)) for way in both))
            for both in self._depths[work.tiles > 0]
        ]

    def recomputed(self, lengths: Iterable[int], work: VisionWork, again: Again) -> list[int]:
        """What recomputation adds to a pack's backward pass, by depth (see `by_depth`): layers, or parts of them, once more forward
        where a gradient goes back through them."""
        key = (work.tiles > 0, again)
        if key not in self._again:
            self._again[key] = _recomputed(self._products, self._num_layers, *key)
        amounts = self._amounts(lengths, work, 0)
        return [round(sum(flops * amount for flops, amount in zip(way, amounts, strict=True))) for way in self._again[key]]

    def a_row(self) -> int:
        """Forward + backward FLOPs of a row of text that attends to nothing."""
        return self._total[False][UNITS.index("token")]

    def _amounts(self, lengths: Iterable[int], work: VisionWork, num_targets: int) -> tuple[int, ...]:
        """How much there is of each of UNITS."""
        tokens = squares = 0
        if self._objective != "vision_classification":
            for length in lengths:
                tokens += length
                squares += length * length
        tiles, patches, pairs, looks = work if self._objective != "text" else VisionWork()
        places = patches // self._patches_per_place if self._patches_per_place else tiles
        features = patches // self._patches_per_feature + self._kept_class_tokens * places
        return (
            tiles,
            places,
            patches,
            pairs,
            tiles if self._pooled else features,
            looks,
            tokens,
            squares,
            num_targets,
        )

    def _coefficients(self, has_tiles: bool) -> tuple[int, ...]:
        """Forward + backward FLOPs per unit, in the order of UNITS."""
        tables = (self._forward, self._backward[has_tiles])
        return tuple(sum(units.get(unit, 0) for table in tables for units in table.values()) for unit in UNITS)


_Coefficients = list[int]
"""FLOPs per unit, in the order of UNITS."""


def _recomputed(products: Sequence[Product], num_layers: int, has_tiles: bool, again: Again) -> list[list[float]]:
    """Forward FLOPs per unit of what is computed again, by depth."""
    depths = [[0.0] * len(UNITS) for _ in range(num_layers + 2)]
    for product in products:
        if product.backward(has_tiles):
            depth = 0 if product.layer is None else product.layer + 1
            depths[depth][UNITS.index(product.unit)] += product.flops * again.share(product)
    return depths


def _by_depth(products: Sequence[Product], num_layers: int, has_tiles: bool) -> list[tuple[_Coefficients, _Coefficients]]:
    """(forward, backward) of what comes before the LLM's layers, of each layer, of what comes behind them."""
    depths = [([0] * len(UNITS), [0] * len(UNITS)) for _ in range(num_layers + 2)]
    for product in products:
        above = num_layers + 1 if product.part == "language.head" else 0
        forward, backward = depths[above if product.layer is None else product.layer + 1]
        forward[UNITS.index(product.unit)] += product.flops
        backward[UNITS.index(product.unit)] += product.backward(has_tiles)
    return depths


def pack_flops(
    model: ModelConfig, segment_lengths: Sequence[int], work: VisionWork, num_targets: int, stage: StageConfig | None = None
) -> PackFlops:
    """FLOPs of one pack: `segment_lengths` tokens each (visual tokens included), its pictures' `work`, `num_targets` loss positions.

    `stage` says what trains and which part of the model runs; None: the whole model, everything training. For the objective
    vision_classification the lengths play no part. Where many packs are asked for, keep a `FlopsModel`.

    Raises:
        TrainingError: the stage's `last_layers` exceeds the layers that there are.
    """
    return FlopsModel(model, stage).pack(segment_lengths, work, num_targets)


def _accumulate(table: dict[str, dict[str, int]], product: Product, flops: int) -> None:
    units = table.setdefault(product.part, {})
    units[product.unit] = units.get(product.unit, 0) + flops
