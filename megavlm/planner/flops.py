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

from megavlm.config.schema import ModelConfig, ModuleTraining, StageConfig, VisionConfig
from megavlm.planner.language import layer_flops, picture_flops, reads_pictures
from megavlm.planner.parameters import first_trainable_layer, head_trains, objective_of
from megavlm.planner.projectors import projector_products


class VisionWork(NamedTuple):
    """What pictures cost the encoder. A tile, or with native resolution a whole picture, is one segment of its attention."""

    tiles: int = 0
    patches: int = 0
    """Over all tiles."""
    patch_pairs: int = 0
    """Sum over tiles of the square of their patches."""

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


@dataclass(frozen=True)
class PackFlops:
    """FLOPs of one pack, and of its parts: vision.embedding, vision.linear, vision.attention, vision.head, projector,
    language.linear, language.attention, language.head."""

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


@dataclass(frozen=True)
class _Product:
    """One family of matrix products in the order of the forward pass."""

    part: str
    flops: int
    """Forward FLOPs per unit."""
    unit: str
    """What it is paid for: tile, place (of a tile in a canvas, filled or not; without a canvas a tile), patch, patch_pair (patches squared
    within a tile), feature (what the projector takes), token, token_squared, target."""
    trains: bool = False
    """Its own weight gets a gradient."""
    trains_below: bool = False
    """Something that its input depends on gets a gradient, whether or not the pack has a picture."""
    trains_below_with_tiles: bool = False
    """The same in a pack that has a picture."""
    attention: bool = False
    layer: int | None = None
    """Of the LLM's layers."""
    of_layer: bool = False
    """Of a layer of the encoder (those of the LLM have a number): parallel.recompute=full computes it again."""

    def backward(self, has_tiles: bool) -> int:
        """Backward FLOPs per unit."""
        below = self.trains_below or (has_tiles and self.trains_below_with_tiles)
        if self.attention:
            return 2 * self.flops if below else 0
        return self.flops * (int(below) + int(self.trains))


_UNITS = ("tile", "place", "patch", "patch_pair", "feature", "token", "token_squared", "target")
_EVERYTHING = ModuleTraining(train="full")


class FlopsModel:
    """The cost of packs under one model and stage, ready to be asked many times.

    `stage=None` means that everything trains (a benchmark of the whole model).
    """

    def __init__(self, model: ModelConfig, stage: StageConfig | None = None) -> None:
        self._pooled = model.vision.pooled
        self._kept_class_tokens = int(model.vision.class_token and model.vision.keep_class_token)
        self._patches_per_place = model.vision.num_patches if model.vision.canvas is not None else None
        self._patches_per_feature = model.projector.pixel_shuffle**2
        products = list(_products(model, stage))
        self._objective = objective_of(model, stage)
        self._forward: dict[str, dict[str, int]] = {}
        self._backward: dict[bool, dict[str, dict[str, int]]] = {False: {}, True: {}}
        for product in products:
            _accumulate(self._forward, product, product.flops)
            for has_tiles in (False, True):
                _accumulate(self._backward[has_tiles], product, product.backward(has_tiles))
        self._total = {has_tiles: self._coefficients(has_tiles) for has_tiles in (False, True)}
        self._again = {
            (has_tiles, attention_only): _recomputed(products, has_tiles, attention_only)
            for has_tiles in (False, True)
            for attention_only in (False, True)
        }
        self._num_layers = model.language.num_layers
        self._depths: dict[bool, list[tuple[_Coefficients, _Coefficients]]] = {
            has_tiles: _by_depth(products, self._num_layers, has_tiles) for has_tiles in (False, True)
        }

    def total(self, lengths: Iterable[int], work: VisionWork, num_targets: int) -> int:
        """Forward + backward FLOPs of a pack of segments of `lengths` tokens; the cheap form for planning."""
        amounts = self._amounts(lengths, work, num_targets)
        return sum(flops * amount for flops, amount in zip(self._total[work.tiles > 0], amounts, strict=True))

    def pack(self, lengths: Iterable[int], work: VisionWork, num_targets: int) -> PackFlops:
        """FLOPs of a pack, part by part."""
        amounts = dict(zip(_UNITS, self._amounts(lengths, work, num_targets), strict=True))
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

    def recomputed(self, lengths: Iterable[int], work: VisionWork, *, attention_only: bool = False) -> int:
        """What recomputation adds: the forward pass once more of every layer that a gradient goes back through, or of its attention."""
        amounts = self._amounts(lengths, work, 0)
        return sum(flops * amount for flops, amount in zip(self._again[work.tiles > 0, attention_only], amounts, strict=True))

    def a_row(self) -> int:
        """Forward + backward FLOPs of a row of text that attends to nothing."""
        return self._total[False][_UNITS.index("token")]

    def _amounts(self, lengths: Iterable[int], work: VisionWork, num_targets: int) -> tuple[int, ...]:
        """How much there is of each of _UNITS."""
        tokens = squares = 0
        if self._objective != "vision_classification":
            for length in lengths:
                tokens += length
                squares += length * length
        tiles, patches, pairs = work if self._objective != "text" else (0, 0, 0)
        places = patches // self._patches_per_place if self._patches_per_place else tiles
        features = patches // self._patches_per_feature + self._kept_class_tokens * places
        return (
            tiles,
            places,
            patches,
            pairs,
            tiles if self._pooled else features,
            tokens,
            squares,
            num_targets,
        )

    def _coefficients(self, has_tiles: bool) -> tuple[int, ...]:
        """Forward + backward FLOPs per unit, in the order of _UNITS."""
        tables = (self._forward, self._backward[has_tiles])
        return tuple(sum(units.get(unit, 0) for table in tables for units in table.values()) for unit in _UNITS)


_Coefficients = list[int]
"""FLOPs per unit, in the order of _UNITS."""


def _recomputed(products: Sequence[_Product], has_tiles: bool, attention_only: bool) -> _Coefficients:
    """Forward FLOPs per unit of what is computed again for the backward pass: layers of encoder and LLM above the lowest that trains."""
    again = [0] * len(_UNITS)
    for product in products:
        of_layer = product.of_layer or product.layer is not None
        if of_layer and product.backward(has_tiles) and (product.attention or not attention_only):
            again[_UNITS.index(product.unit)] += product.flops
    return again


def _by_depth(products: Sequence[_Product], num_layers: int, has_tiles: bool) -> list[tuple[_Coefficients, _Coefficients]]:
    """(forward, backward) of what comes before the LLM's layers, of each layer, of what comes behind them."""
    depths = [([0] * len(_UNITS), [0] * len(_UNITS)) for _ in range(num_layers + 2)]
    for product in products:
        above = num_layers + 1 if product.part == "language.head" else 0
        forward, backward = depths[above if product.layer is None else product.layer + 1]
        forward[_UNITS.index(product.unit)] += product.flops
        backward[_UNITS.index(product.unit)] += product.backward(has_tiles)
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


def _accumulate(table: dict[str, dict[str, int]], product: _Product, flops: int) -> None:
    units = table.setdefault(product.part, {})
    units[product.unit] = units.get(product.unit, 0) + flops


def _products(model: ModelConfig, stage: StageConfig | None) -> Iterable[_Product]:
    """Every matrix product that the stage's objective runs, in the order of the forward pass."""
    objective = objective_of(model, stage)
    vision_training = stage.vision if stage else _EVERYTHING
    encoder_trains = vision_training.train != "frozen"
    if objective != "text":
        for encoder in model.encoders:
            yield from _encoder(encoder, vision_training)
    if objective == "vision_classification":
        # The temporary head is always trained: it starts from nothing.
        classes = (stage.num_classes if stage else None) or 0
        yield _Product("vision.head", 2 * model.feature_size * classes, "target", True, trains_below_with_tiles=encoder_trains)
        return
    projector_trains = (stage.projector if stage else _EVERYTHING).train != "frozen"
    if objective == "multimodal":
        yield from _projector(model, projector_trains, encoder_trains)
    pictures_train = objective == "multimodal" and (projector_trains or encoder_trains)
    yield from _language(model, stage.language if stage else _EVERYTHING, pictures_train)


def _encoder(config: VisionConfig, training: ModuleTraining) -> Iterable[_Product]:
    """Patch embedding (its input, pixels, needs no gradient), the layers that run, the pooling head. Every trainable layer begins with
    a trainable norm, so that even the lowest needs the gradient of its first product's input."""
    width, ffn = config.hidden_size, config.ffn_hidden_size
    patch = config.num_channels * config.temporal_patch_size * config.patch_size_px**2
    if config.canvas is not None:
        yield from _canvas(config, 2 * patch * config.hidden_size, training)
        return
    yield _Product("vision.embedding", 2 * patch * width, "patch", training.train == "full")
    extra = int(config.class_token) + config.num_register_tokens
    linear = 2 * width * (4 * width + (3 if config.gated_mlp else 2) * ffn)
    first = first_trainable_layer(training, config.num_run_layers, "vision")
    for layer in range(config.num_run_layers):
        trains = layer >= first
        for flops, unit in ((linear, "patch"), (linear * extra, "tile")):
            yield _Product("vision.linear", flops, unit, trains, trains, of_layer=True)
        # (patches + extra) squared within a tile; within windows all are taken for whole ones, those at a picture's edges too
        window = config.window_patches if layer not in config.full_attention_layers else None
        pairs = (1, "patch_pair") if window is None else (window, "patch")
        for times, unit in (pairs, (2 * extra, "patch"), (extra**2, "tile")):
            yield _Product("vision.attention", 4 * width * times, unit, False, trains, attention=True, of_layer=True)
    if config.pooled:
        below, trains = training.train != "frozen", training.train == "full"
        yield _Product("vision.linear", 4 * width**2, "patch", trains, below)  # keys and values
        yield _Product("vision.attention", 4 * width, "patch", False, below, attention=True)
        yield _Product("vision.linear", 2 * width * (2 * width + 2 * ffn), "tile", trains, trains)


CANVAS_ROW_MULTIPLE = 8
"""As models/vision/canvas.py fills the rows of a tile up (a test holds the two equal; no torch here)."""


def _canvas(config: VisionConfig, embedding: int, training: ModuleTraining) -> Iterable[_Product]:
    """An encoder that sees a picture's tiles together: all places of a canvas go through its layers, filled or not.

    Of `size` rows of a canvas, a picture's own see all, and the others see these: 2 own size - own^2 pairs. Between one tile and a full
    canvas this is taken to be linear in the tiles, which is exact at both ends and too little between them (at most 1/6 with four).
    """
    trains, patches, tiles = training.train != "frozen", config.num_patches, config.canvas_tiles or 1
    own = patches + int(config.class_token) + config.num_register_tokens
    rows = -(-own // CANVAS_ROW_MULTIPLE) * CANVAS_ROW_MULTIPLE
    yield _Product("vision.embedding", embedding * patches, "tile", training.train == "full")
    width = config.hidden_size
    linear = 2 * width * (4 * width + (3 if config.gated_mlp else 2) * config.ffn_hidden_size)
    for _ in range(config.num_run_layers):
        yield _Product("vision.linear", linear * rows, "place", trains, trains, of_layer=True)
        for pairs, unit in ((2 * own * tiles * rows - own**2 * (tiles + 1), "tile"), (own**2, "place")):
            yield _Product("vision.attention", 4 * width * pairs, unit, False, trains, attention=True, of_layer=True)


def _projector(model: ModelConfig, trains: bool, encoder_trains: bool) -> Iterable[_Product]:
    for product in projector_products(model):
        below = (trains and product.own_below) or (encoder_trains and product.encoder_below)
        yield _Product("projector", product.flops, product.unit, trains and not product.attention, below, attention=product.attention)


def _language(model: ModelConfig, training: ModuleTraining, pictures_train: bool) -> Iterable[_Product]:
    """Decoder layers per token and per token squared, head per target. The embedding is a look-up: no FLOPs, but with train=full
    it trains, and every layer above needs input gradients. A sliding window counts as the whole triangle; of what cross-attention
    layers read, keys and values count, and not the scores."""
    config = model.language
    query = config.num_attention_heads * config.head_width
    first = first_trainable_layer(training, config.num_layers, "language")
    for layer in range(config.num_layers):
        trains = layer >= first
        # Where layers read pictures, the text below the first of them does not hang on any.
        seen = pictures_train and (config.cross_attention is None or layer >= min(config.cross_attention.layers))
        yield _Product("language.linear", layer_flops(config, layer), "token", trains, trains, seen, layer=layer)
        if reads_pictures(config, layer):
            flops = picture_flops(config)
            yield _Product("language.linear", flops, "feature", trains, trains_below_with_tiles=pictures_train, layer=layer)
        else:
            yield _Product("language.attention", 2 * query, "token_squared", False, trains, seen, attention=True, layer=layer)
    yield _Product(
        "language.head",
        2 * config.hidden_size * config.vocab_size,
        "target",
        head_trains(model, training),
        training.train != "frozen",
        pictures_train,
    )
