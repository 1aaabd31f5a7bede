"""Parameters of a model, exactly: how many, on which rank, and what of them trains.

Counts are of the weights as Hugging Face stores them (vocabulary unpadded). Weights that no gradient reaches (encoder layers above
`vision.feature_layer`, the final norm when features skip it, SigLIP's pooling head) are counted as `carried`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from megavlm.config.schema import ModelConfig, ModuleTraining, StageConfig, VisionConfig
from megavlm.planner.language import (
    embedding_parameters,
    expert_parameters,
    has_experts,
    layer_parameters,
    norm_parameters,
    position_parameters,
)
from megavlm.planner.projectors import projector_parameters

MODULES = ("vision", "projector", "language", "vision_head")


class TrainingError(ValueError):
    """A stage trains layers that the model does not have."""


@dataclass(frozen=True)
class ParameterBlock:
    """Weights that live and train together."""

    module: str
    """vision, projector, language, or vision_head (the temporary head of vision_classification)."""
    part: str
    """embedding, layer, experts (of a layer), norm, head, mlp or carried."""
    layer: int | None
    """Place in the module's layers that run, counted from 0; None: not a layer."""
    total: int
    """Over all tensor ranks."""
    local: int
    """On one rank."""
    trains: bool
    encoder: int = 0
    """vision only: which of the encoders side by side."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of one module."""

    total: int
    trainable: int
    carried: int
    """Part of `total` that the forward pass never reads."""


def params(model: ModelConfig, stage: StageConfig | None = None) -> dict[str, ParameterCount]:
    """Counts by module. `stage` says which modules there are and what trains; None: the whole model, everything that can train."""
    blocks = list(parameter_blocks(model, stage))
    return {
        module: ParameterCount(
            total=sum(b.total for b in mine),
            trainable=sum(b.total for b in mine if b.trains),
            carried=sum(b.total for b in mine if b.part == "carried"),
        )
        for module in MODULES
        if (mine := [b for b in blocks if b.module == module])
    }


def parameter_blocks(
    model: ModelConfig,
    stage: StageConfig | None = None,
    tensor: int = 1,
    expert: int = 1,
    *,
    encoder_tensor: int | None = None,
    projector_tensor: int | None = None,
) -> Iterator[ParameterBlock]:
    """Every block of the model that `stage` builds (None: the whole model, everything training), in the order of the forward pass.

    `tensor` and `expert` are the ranks that share a layer and its experts; encoder and projector may be shared by others
    (config/tensor_split.py), None meaning by as many.

    Raises:
        TrainingError: `last_layers` of a module exceeds its layers.
    """
    everything = ModuleTraining()
    objective = objective_of(model, stage)
    if objective != "text":
        yield from _vision(model.encoders, stage.vision if stage else everything, encoder_tensor or tensor)
    if objective == "multimodal":
        yield _projector(model, (stage.projector if stage else everything).train != "frozen", projector_tensor or tensor)
    if objective == "vision_classification":
        size = model.feature_size * ((stage.num_classes if stage else None) or 0)
        yield ParameterBlock("vision_head", "head", None, size, size, True)
    else:
        yield from _language(model, stage.language if stage else everything, tensor, expert)


def objective_of(model: ModelConfig, stage: StageConfig | None) -> str:
    """The stage's objective; without one that of the whole model."""
    return stage.objective if stage else "text" if model.text_only else "multimodal"


def first_trainable_layer(training: ModuleTraining, num_layers: int, module: str) -> int:
    """Lowest of `num_layers` layers that trains; num_layers when none does.

    Raises:
        TrainingError: `last_layers` exceeds the layers.
    """
    if training.train == "frozen":
        return num_layers
    if training.train == "full":
        return 0
    last_layers = training.last_layers or 0
    if last_layers > num_layers:
        raise TrainingError(
            f"{module}.last_layers={last_layers}, but the {module} runs {num_layers} layers: use train=full or fewer layers"
        )
    return num_layers - last_layers


def head_trains(model: ModelConfig, training: ModuleTraining) -> bool:
    """Does the output head get a gradient? A tied head is the embedding: it trains with the whole model or not at all."""
    return training.train == "full" or (training.train == "last_layers" and not model.language.tie_embeddings)


def _vision(encoders: Sequence[VisionConfig], training: ModuleTraining, tensor: int) -> Iterator[ParameterBlock]:
    """Encoders one after another."""
    for number, encoder in enumerate(encoders):
        for block in _encoder(encoder, training, tensor):
            yield replace(block, encoder=number)


def _encoder(config: VisionConfig, training: ModuleTraining, tensor: int) -> Iterator[ParameterBlock]:
    """Patch, position and other learned tokens; layers; final norm; whatever is carried. Matrices inside layers are split over tensor
    ranks."""
    width, ffn = config.hidden_size, config.ffn_hidden_size
    norm = 2 * width if config.norm == "layer_norm" else width
    patch = (config.num_channels * config.temporal_patch_size * config.patch_size_px**2 + int(config.patch_bias)) * width
    tokens = config.num_position_rows and config.num_position_rows + int(config.class_token)
    tokens += int(config.class_token) + config.num_register_tokens
    embedding = patch + tokens * width + (norm if config.pre_norm else 0) + _canvas_parameters(config)
    yield ParameterBlock("vision", "embedding", None, embedding, embedding, training.train == "full")
    biases = int(config.linear_bias)
    first_linear = (2 if config.gated_mlp else 1) * (width + biases) * ffn
    split = 3 * (width + int(config.qkv_bias)) * width + width * width + first_linear + ffn * width + (2 * width if config.qk_norm else 0)
    whole = 2 * norm + (1 + int(config.attention_output_bias)) * width * biases + (2 * width if config.layer_scale else 0)
    first = first_trainable_layer(training, config.num_run_layers, "vision")
    for layer in range(config.num_run_layers):
        own = whole + (2 if layer >= config.num_used_layers else 0)  # gates behind the canvas's norm
        yield ParameterBlock("vision", "layer", layer, split + own, split // tensor + own, layer >= first)
    above = config.num_layers - config.num_used_layers
    unused = above * whole + (width if config.mask_token else 0)
    if config.final_norm or config.canvas is not None:
        yield ParameterBlock("vision", "norm", None, norm, norm, training.train != "frozen")
    elif config.has_final_norm:
        unused += norm
    if config.pooling_head:
        # Probe, attention (in and out projections with bias), LayerNorm, MLP: transformers' SiglipMultiheadAttentionPoolingHead.
        head = width + 4 * (width * width + width) + 2 * width + 2 * width * ffn + ffn + width
        if config.pooled:
            yield ParameterBlock("vision", "head", None, head, head, training.train == "full")
        else:
            unused += head
    if unused or above:
        yield ParameterBlock("vision", "carried", None, unused + above * split, unused + above * (split // tensor), False)


def _canvas_parameters(config: VisionConfig) -> int:
    """Vectors for each tile of each grid, before the first layer, behind the norm, and one for each row; and a gate for each table."""
    if config.canvas is None:
        return 0
    rows = 2 + config.num_patches + int(config.class_token)
    return (len(config.canvas.grids) + 1) * config.canvas.max_tiles * rows * config.hidden_size + 3


def _projector(model: ModelConfig, trains: bool, tensor: int) -> ParameterBlock:
    split, whole = projector_parameters(model)
    return ParameterBlock("projector", "mlp", None, split + whole, split // tensor + whole, trains)


def _language(model: ModelConfig, training: ModuleTraining, tensor: int, expert: int) -> Iterator[ParameterBlock]:
    """Embedding, layers, final norm, head (absent when tied)."""
    config, trains = model.language, training.train == "full"
    tokens, places = embedding_parameters(config), position_parameters(config)
    yield ParameterBlock("language", "embedding", None, tokens, tokens // tensor, trains)
    if places:
        yield ParameterBlock("language", "embedding", None, places, places, trains)
    first = first_trainable_layer(training, config.num_layers, "language")
    for layer in range(config.num_layers):
        total, local = layer_parameters(config, layer), layer_parameters(config, layer, tensor)
        yield ParameterBlock("language", "layer", layer, total, local, layer >= first)
        if has_experts(config, layer):
            total, local = expert_parameters(config, layer), expert_parameters(config, layer, tensor, expert)
            yield ParameterBlock("language", "experts", layer, total, local, layer >= first)
    norm = norm_parameters(config)
    yield ParameterBlock("language", "norm", None, norm, norm, training.train != "frozen")
    if not config.tie_embeddings:
        head = config.vocab_size * config.hidden_size
        yield ParameterBlock("language", "head", None, head, head // tensor, head_trains(model, training))
