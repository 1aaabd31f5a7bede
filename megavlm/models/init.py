"""Random initialisation that does not depend on the layout.

Each global tensor is drawn from a generator seeded by (seed, checkpoint key); ranks cut out their slices. A layout
therefore changes no weight, and neither does adding a layer elsewhere.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence

import torch

from megavlm.config.schema import ModelConfig
from megavlm.models.weights import Provider, Where, assign, is_vocabulary
from megavlm.parallel.context import ParallelContext

RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


def initialise(chunks: Sequence[torch.nn.Module], model: ModelConfig, seed: int, ctx: ParallelContext) -> None:
    """Norms to one, biases to zero, everything else normal with `model.init_std`.

    Layers that write to the residual stream get init_std / sqrt(2 x layers), as GPT-2 does (section 2.3 of its report); the
    image_newline 1 / sqrt(width), as LLaVA-NeXT does (transformers, models/llava_next).
    """
    assign(chunks, random_provider(model, seed), ctx)


def random_provider(model: ModelConfig, seed: int) -> Provider:
    """(key, shape, slice) -> freshly drawn numbers in fp32."""

    def provide(key: str, shape: tuple[int, ...], where: Where) -> torch.Tensor:
        return whole(key, shape)[where]

    def whole(key: str, shape: tuple[int, ...]) -> torch.Tensor:
        name = key.rsplit(".", 1)[-1]
        if name in ("bias", "layer_norm_bias", "in_proj_bias"):
            return torch.zeros(shape)
        if "norm" in key.rsplit(".", 2)[-2] or name == "layer_norm_weight" or (len(shape) == 1 and name.endswith("weight")):
            as_language = ("language.", "projector.") if model.projector.kind == "average_pool" else ("language.",)
            zero_centered = key.startswith(as_language) and model.language.zero_centered_norm
            return torch.zeros(shape) if zero_centered else torch.ones(shape)
        if name.endswith("gate"):  # tanh(gate): what the layer adds starts as nothing, as in Flamingo (https://arxiv.org/abs/2204.14198)
            return torch.zeros(shape)
        if is_vocabulary(key):
            rows = model.language.num_tokens if "word_embeddings" in key else model.language.vocab_size
            shape = (rows, *shape[1:])  # padding depends on the layout: it is never drawn
        std = model.init_std
        if key.endswith(RESIDUAL_OUTPUTS):
            beside = re.match(r"vision\.beside_(\d+)\.", key)
            encoder = model.vision if beside is None else model.vision_beside[int(beside[1])]
            layers = encoder.num_used_layers if key.startswith("vision") else model.language.num_layers
            std /= math.sqrt(2 * layers)
        if name == "image_newline":
            std = 1 / math.sqrt(shape[0])
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{key}".encode()))
        return torch.randn(shape, generator=generator) * std

    return provide
