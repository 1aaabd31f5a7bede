"""What a projector holds and computes, by kind: parameters, matrix products, activations that it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megavlm.config.projector import QFormerConfig
from megavlm.config.schema import ModelConfig


class ProjectorProduct(NamedTuple):
    """One family of matrix products, in the order of the forward pass."""

    flops: int
    """Forward FLOPs per unit."""
    unit: str
    """feature: what the projector takes, neighbours merged; tile: a tile or a picture."""
    own_below: bool = True
    """Something of the projector that can train lies below it."""
    encoder_below: bool = True
    """The encoder's features lie below it."""
    attention: bool = False


def projector_parameters(model: ModelConfig) -> tuple[int, int]:
    """(parameters that are split over tensor ranks, those that every tensor rank holds whole)."""
    config, width = model.projector, model.language.hidden_size
    inputs = model.projector_input_size
    hidden, bias = config.hidden_size or width, int(config.bias)
    if config.kind == "average_pool":
        return 0, inputs + inputs * width
    if config.resampler is not None:
        return _resampler_parameters(model)
    if config.qformer is not None:
        return _qformer_parameters(config.qformer, model.feature_size, width)
    norms = {"layer_norm": 2, "rms_norm": 1, None: 0}
    whole = norms[config.patch_norm] * model.feature_size + (width if config.image_newline else 0)
    split = 0
    if config.merge_linear:
        split, inputs = inputs * model.feature_size, model.feature_size
    whole += 2 * inputs if config.input_norm else 0
    own = _linear_parameters(inputs, hidden, width, config.num_layers, bias)
    # DeepStack's mergers: a LayerNorm behind the merging, then the same layers over one encoder layer's features.
    deep_inputs = model.vision.hidden_size * config.pixel_shuffle**2
    deep = _linear_parameters(deep_inputs, hidden, width, config.num_layers, bias)
    count = len(model.vision.deepstack_layers)
    return split + own[0] + count * deep[0], whole + own[1] + count * (deep[1] + 2 * deep_inputs)


def _linear_parameters(inputs: int, hidden: int, width: int, layers: int, bias: int) -> tuple[int, int]:
    """(split, whole) of one to three linear layers: column-, row-, column-parallel; a row-parallel bias is whole."""
    if layers == 1:
        return (inputs + bias) * width, 0
    if layers == 2:
        return (inputs + bias) * hidden + hidden * width, bias * width
    return (inputs + bias) * hidden + hidden * hidden + (hidden + bias) * width, bias * hidden


def _resampler_parameters(model: ModelConfig) -> tuple[int, int]:
    config, resampler, width = model.projector, model.projector.resampler, model.language.hidden_size
    assert resampler is not None
    hidden, inner = config.hidden_size or width, resampler.ffn_hidden_size or 4 * width
    heads, groups = (n * resampler.head_dim for n in (resampler.num_attention_heads, resampler.num_query_groups))
    layer = width * (2 * heads + 2 * groups) + 3 * width * inner
    split = (2 * model.projector_input_size + width) * hidden + resampler.num_layers * layer
    return split, (resampler.num_latents + 3 * resampler.num_layers + 1) * width


def _qformer_parameters(qformer: QFormerConfig, inputs: int, out: int) -> tuple[int, int]:
    width, inner, readers = qformer.hidden_size, qformer.ffn_hidden_size, _readers(qformer)
    query_and_output, linear = (width + 1) * width + width * width, 2 * (width + 1) * width
    words = qformer.instruction
    mlp = (width + 1) * inner + inner * width
    split = qformer.num_layers * (query_and_output + linear + mlp) + readers * (query_and_output + 2 * (inputs + 1) * width)
    # Biases of rows and a norm's two vectors: after each attention and each MLP.
    whole = 3 * width * (2 * qformer.num_layers + readers) + 2 * width + qformer.num_queries * width
    if words is not None:
        split += qformer.num_layers * mlp
        whole += qformer.num_layers * 3 * width + (words.vocab_size + words.max_positions) * width
    return split + (width + 1) * out, whole


def _readers(qformer: QFormerConfig) -> int:
    """Layers that read the picture."""
    return -(-qformer.num_layers // qformer.cross_attention_frequency)


def _qformer_products(qformer: QFormerConfig, inputs: int, out: int) -> Iterator[ProjectorProduct]:
    """Without the words of an instruction, whose number no plan knows."""
    width, inner, queries = qformer.hidden_size, qformer.ffn_hidden_size, qformer.num_queries
    for layer in range(qformer.num_layers):
        # The queries themselves do not hang on the encoder; what the first layer made of them does.
        yield ProjectorProduct(8 * width * width * queries, "tile", encoder_below=layer > 0)
        yield ProjectorProduct(4 * width * queries * queries, "tile", encoder_below=layer > 0, attention=True)
        if layer % qformer.cross_attention_frequency == 0:
            yield ProjectorProduct(2 * width * width * queries, "tile", encoder_below=layer > 0)
            yield ProjectorProduct(4 * inputs * width, "feature", own_below=False)
            yield ProjectorProduct(4 * width * queries, "feature", attention=True)
            yield ProjectorProduct(2 * width * width * queries, "tile")
        yield ProjectorProduct(4 * width * inner * queries, "tile")
    yield ProjectorProduct(2 * width * out * queries, "tile")


def projector_products(model: ModelConfig) -> Iterator[ProjectorProduct]:
    """Every matrix product."""
    config, width = model.projector, model.language.hidden_size
    inputs, hidden = model.projector_input_size, config.hidden_size or width
    if config.resampler is not None:
        yield from _resampler_products(model)
        return
    if config.qformer is not None:
        yield from _qformer_products(config.qformer, model.feature_size, width)
        return
    norm_below = config.input_norm or config.patch_norm is not None or config.kind == "average_pool"
    if config.merge_linear:
        yield ProjectorProduct(2 * inputs * model.feature_size, "feature", own_below=norm_below)
        inputs, norm_below = model.feature_size, True
    count = len(model.vision.deepstack_layers)
    deep_inputs = model.vision.hidden_size * config.pixel_shuffle**2
    first = width if config.num_layers == 1 else hidden
    yield ProjectorProduct(2 * inputs * first, "feature", own_below=norm_below)
    if count:
        yield ProjectorProduct(2 * deep_inputs * first * count, "feature")
    if config.num_layers == 3:
        yield ProjectorProduct(2 * hidden * hidden * (1 + count), "feature")
    if config.num_layers > 1:
        yield ProjectorProduct(2 * hidden * width * (1 + count), "feature")


def _resampler_products(model: ModelConfig) -> Iterator[ProjectorProduct]:
    config, resampler, width = model.projector, model.projector.resampler, model.language.hidden_size
    assert resampler is not None
    hidden, inner, latents = config.hidden_size or width, resampler.ffn_hidden_size or 4 * width, resampler.num_latents
    heads, groups = (n * resampler.head_dim for n in (resampler.num_attention_heads, resampler.num_query_groups))
    yield ProjectorProduct(4 * model.projector_input_size * hidden, "feature", own_below=False)
    yield ProjectorProduct(2 * hidden * width, "feature")
    for layer in range(resampler.num_layers):
        # The latents themselves do not hang on the encoder; what the first layer made of them does.
        yield ProjectorProduct(2 * width * heads * latents, "tile", encoder_below=layer > 0)
        yield ProjectorProduct(4 * width * groups, "feature")
        yield ProjectorProduct(4 * width * groups * latents, "tile")
        # Scores, then the weighted sum. The first layer's queries need a gradient only where the latents train, as a weight does.
        for unit, keys in (("feature", 1), ("tile", latents)):
            yield ProjectorProduct(2 * heads * latents * keys, unit, attention=layer > 0)
            yield ProjectorProduct(2 * heads * latents * keys, unit, attention=True)
        yield ProjectorProduct((2 * heads * width + 6 * width * inner) * latents, "tile")


def projector_elements(model: ModelConfig, features: int, tiles: int, tensor: int) -> float:
    """Elements that the projector keeps for its backward pass: inputs, and what stands before and after each activation."""
    config, resampler, width = model.projector, model.projector.resampler, model.language.hidden_size
    inputs, hidden = model.projector_input_size, config.hidden_size or width
    if config.qformer is not None:
        return _qformer_elements(config.qformer, model.feature_size, features, tiles, tensor)
    if resampler is None:
        normed = config.input_norm or config.patch_norm is not None or config.kind == "average_pool"
        middle = 2 * hidden * (config.num_layers - 1) / tensor
        deep = len(model.vision.deepstack_layers) * (2 * model.vision.hidden_size * config.pixel_shuffle**2 + middle)
        merged = model.feature_size if config.merge_linear else 0
        return features * (inputs * (2 if normed else 1) + merged + middle + deep)
    inner = resampler.ffn_hidden_size or 4 * width
    heads, groups = (n * resampler.head_dim for n in (resampler.num_attention_heads, resampler.num_query_groups))
    rows = tiles * resampler.num_latents
    layer = (features + rows) * (2 * width + 2 * groups / tensor) + rows * (4 * width + (2 * heads + 4 * inner) / tensor)
    return features * (inputs + width + 4 * hidden / tensor) + resampler.num_layers * layer


def _qformer_elements(qformer: QFormerConfig, inputs: int, features: int, tiles: int, tensor: int) -> float:
    width, inner, rows = qformer.hidden_size, qformer.ffn_hidden_size, tiles * qformer.num_queries
    # Of each attention: what comes in, the sum before the norm, queries, keys, values and their result.
    layer = rows * (2 * width + 4 * width / tensor) + rows * (2 * width + 2 * inner / tensor)
    reading = rows * (2 * width + 2 * width / tensor) + features * 2 * width / tensor
    return features * inputs + qformer.num_layers * layer + _readers(qformer) * reading + 2 * rows * width
