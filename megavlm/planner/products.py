"""Every matrix product of a model under a stage, in the order of the forward pass: what planner/flops.py adds up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megavlm.config.schema import ModelConfig, ModuleTraining, StageConfig, VisionConfig
from megavlm.planner.language import layer_flops, mlp_flops, picture_flops, reads_pictures
from megavlm.planner.parameters import first_trainable_layer, head_trains, objective_of
from megavlm.planner.projectors import projector_products

UNITS = ("tile", "place", "patch", "patch_pair", "feature", "look", "token", "token_squared", "target")
_EVERYTHING = ModuleTraining(train="full")


@dataclass(frozen=True)
class Product:
    """One family of matrix products in the order of the forward pass."""

    part: str
    flops: int
    """Forward FLOPs per unit."""
    unit: str
    """What it is paid for: tile, place (of a tile in a canvas, filled or not; without a canvas a tile), patch, patch_pair (patches squared
    within a tile), feature (what the projector takes), look (a row of text at a feature), token, token_squared, target."""
    trains: bool = False
    """Its own weight gets a gradient."""
    trains_below: bool = False
    """Something that its input depends on gets a gradient, whether or not the pack has a picture."""
    trains_below_with_tiles: bool = False
    """The same in a pack that has a picture."""
    attention: bool = False
    mlp: bool = False
    layer: int | None = None
    """Of the LLM's layers."""
    encoder_layer: int | None = None
    """Of an encoder's layers, counted within its stack."""

    def backward(self, has_tiles: bool) -> int:
        """Backward FLOPs per unit."""
        below = self.trains_below or (has_tiles and self.trains_below_with_tiles)
        if self.attention:
            return 2 * self.flops if below else 0
        return self.flops * (int(below) + int(self.trains))


def products(model: ModelConfig, stage: StageConfig | None) -> Iterable[Product]:
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
        yield Product("vision.head", 2 * model.feature_size * classes, "target", True, trains_below_with_tiles=encoder_trains)
        return
    projector_trains = (stage.projector if stage else _EVERYTHING).train != "frozen"
    if objective == "multimodal":
        yield from _projector(model, projector_trains, encoder_trains)
    pictures_train = objective == "multimodal" and (projector_trains or encoder_trains)
    yield from _language(model, stage.language if stage else _EVERYTHING, pictures_train)


def _encoder(config: VisionConfig, training: ModuleTraining) -> Iterable[Product]:
    """Patch embedding (its input, pixels, needs no gradient), the layers that run, the pooling head. Every trainable layer begins with
    a trainable norm, so that even the lowest needs the gradient of its first product's input."""
    width, ffn = config.hidden_size, config.ffn_hidden_size
    patch = config.num_channels * config.temporal_patch_size * config.patch_size_px**2
    if config.canvas is not None:
        yield from _canvas(config, 2 * patch * config.hidden_size, training)
        return
    yield Product("vision.embedding", 2 * patch * width, "patch", training.train == "full")
    extra = int(config.class_token) + config.num_register_tokens
    first = first_trainable_layer(training, config.num_run_layers, "vision")
    for layer in range(config.num_run_layers):
        trains = layer >= first
        for flops, mlp in ((8 * width**2, False), (_mlp(config), True)):
            for rows, unit in ((1, "patch"), (extra, "tile")):
                yield Product("vision.linear", flops * rows, unit, trains, trains, mlp=mlp, encoder_layer=layer)
        # (patches + extra) squared within a tile; within windows all are taken for whole ones, those at a picture's edges too
        window = config.window_patches if layer not in config.full_attention_layers else None
        pairs = (1, "patch_pair") if window is None else (window, "patch")
        for times, unit in (pairs, (2 * extra, "patch"), (extra**2, "tile")):
            yield Product("vision.attention", 4 * width * times, unit, False, trains, attention=True, encoder_layer=layer)
    if config.pooled:
        below, trains = training.train != "frozen", training.train == "full"
        yield Product("vision.linear", 4 * width**2, "patch", trains, below)  # keys and values
        yield Product("vision.attention", 4 * width, "patch", False, below, attention=True)
        yield Product("vision.linear", 2 * width * (2 * width + 2 * ffn), "tile", trains, trains)


def _mlp(config: VisionConfig) -> int:
    """Forward FLOPs of an encoder layer's MLP on one row."""
    return 2 * config.hidden_size * (3 if config.gated_mlp else 2) * config.ffn_hidden_size


CANVAS_ROW_MULTIPLE = 8
"""As models/vision/canvas.py fills the rows of a tile up (a test holds the two equal; no torch here)."""


def _canvas(config: VisionConfig, embedding: int, training: ModuleTraining) -> Iterable[Product]:
    """An encoder that sees a picture's tiles together: all places of a canvas go through its layers, filled or not.

    Of `size` rows of a canvas, a picture's own see all, and the others see these: 2 own size - own^2 pairs. Between one tile and a full
    canvas this is taken to be linear in the tiles, which is exact at both ends and too little between them (at most 1/6 with four).
    """
    trains, patches, tiles = training.train != "frozen", config.num_patches, config.canvas_tiles or 1
    own = patches + int(config.class_token) + config.num_register_tokens
    rows = -(-own // CANVAS_ROW_MULTIPLE) * CANVAS_ROW_MULTIPLE
    yield Product("vision.embedding", embedding * patches, "tile", training.train == "full")
    width = config.hidden_size
    # Local layers are one stack, global ones another.
    for layer in (*range(config.num_used_layers), *range(config.num_run_layers - config.num_used_layers)):
        for flops, mlp in ((8 * width**2, False), (_mlp(config), True)):
            yield Product("vision.linear", flops * rows, "place", trains, trains, mlp=mlp, encoder_layer=layer)
        for pairs, unit in ((2 * own * tiles * rows - own**2 * (tiles + 1), "tile"), (own**2, "place")):
            yield Product("vision.attention", 4 * width * pairs, unit, False, trains, attention=True, encoder_layer=layer)


def _projector(model: ModelConfig, trains: bool, encoder_trains: bool) -> Iterable[Product]:
    for product in projector_products(model):
        below = (trains and product.own_below) or (encoder_trains and product.encoder_below)
        yield Product("projector", product.flops, product.unit, trains and not product.attention, below, attention=product.attention)


def _language(model: ModelConfig, training: ModuleTraining, pictures_train: bool) -> Iterable[Product]:
    """Decoder layers per token and per token squared, head per target. The embedding is a look-up: no FLOPs, but with train=full
    it trains, and every layer above needs input gradients. A sliding window counts as the whole triangle."""
    config = model.language
    query = config.num_attention_heads * config.head_width
    first = first_trainable_layer(training, config.num_layers, "language")
    for layer in range(config.num_layers):
        trains = layer >= first
        # Where layers read pictures, the text below the first of them does not hang on any.
        seen = pictures_train and (config.cross_attention is None or layer >= min(config.cross_attention.layers))
        mlp = mlp_flops(config, layer)
        yield Product("language.linear", layer_flops(config, layer) - mlp, "token", trains, trains, seen, layer=layer)
        yield Product("language.linear", mlp, "token", trains, trains, seen, mlp=True, layer=layer)
        if reads_pictures(config, layer):
            flops = picture_flops(config)
            yield Product("language.linear", flops, "feature", trains, trains_below_with_tiles=pictures_train, layer=layer)
            below = {"trains_below": trains or seen, "trains_below_with_tiles": pictures_train}
            yield Product("language.cross_attention", 4 * query, "look", **below, attention=True, layer=layer)
        else:
            yield Product("language.attention", 2 * query, "token_squared", False, trains, seen, attention=True, layer=layer)
    yield Product(
        "language.head",
        2 * config.hidden_size * config.vocab_size,
        "target",
        head_trains(model, training),
        training.train != "frozen",
        pictures_train,
    )
