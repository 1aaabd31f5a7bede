"""What of encoder and LLM is computed once more in the backward pass: parallel.recompute and the fields beside it."""

from __future__ import annotations

from typing import NamedTuple

from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.planner.products import Product
from megavlm.topology.pipeline import PipelineSplit


class LayerAgain(NamedTuple):
    """Shares, 0 to 1, of a layer's matrix products that run forward a second time."""

    attention: float = 0.0
    """Scores and weighted sums."""
    mlp: float = 0.0
    rest: float = 0.0


class Again(NamedTuple):
    """Of the layers of every encoder, and of the LLM, from the first; layers that are not named have nothing computed again."""

    encoder: tuple[LayerAgain, ...] = ()
    language: tuple[LayerAgain, ...] = ()

    def share(self, product: Product) -> float:
        """Of one product."""
        layers, number = (self.encoder, product.encoder_layer) if product.layer is None else (self.language, product.layer)
        if number is None or number >= len(layers):
            return 0.0
        layer = layers[number]
        if product.unit == "look":
            return layer.rest  # what selective recomputation calls attention is that of text to text
        return layer.attention if product.attention else layer.mlp if product.mlp else layer.rest


NOTHING_AGAIN = Again()


def recomputed(parallel: ParallelConfig, model: ModelConfig) -> Again:
    """As `parallel` says. Where it leaves the split of the LLM's layers to a balance that is still to be found, recompute_layers counts
    as the share of all layers that it is of equal chunks."""
    deepest = 0 if model.text_only else max(encoder.num_run_layers for encoder in model.encoders)
    limit = parallel.recompute_layers
    encoder = _layers(parallel, parallel.encoder_recompute, [1.0 if limit is None or n < limit else 0.0 for n in range(deepest)])
    number = model.language.num_layers
    if limit is None:
        shares = [1.0] * number
    elif parallel.pipeline > 1 and parallel.split != "even":
        shares = [min(limit * parallel.pipeline * parallel.virtual_pipeline / number, 1.0)] * number
    else:
        shares = [1.0 if place < limit else 0.0 for count in PipelineSplit.of(number, parallel).counts for place in range(count)]
    return Again(encoder, _layers(parallel, parallel.recompute, shares))


def _layers(parallel: ParallelConfig, chosen: str, shares: list[float]) -> tuple[LayerAgain, ...]:
    """`shares`: of each layer, with full recomputation."""
    if chosen == "full":
        return tuple(LayerAgain(share, share, share) for share in shares)
    if chosen == "selective":
        again = LayerAgain(float("core_attn" in parallel.recompute_modules), float("mlp" in parallel.recompute_modules))
        return (again,) * len(shares)
    return ()
