"""The recipe's `model.projector` block."""

from __future__ import annotations

from typing import Literal

from megavlm.config.blocks import Block, PositiveInt


class ProjectorConfig(Block):
    """What maps visual features to the LLM's width."""

    kind: Literal["mlp"] = "mlp"
    """mlp: linear layers on each feature."""
    num_layers: Literal[1, 2, 3] = 2
    """Linear layers, with the activation between them (1: linear; 2: LLaVA-1.5)."""
    hidden_size: PositiveInt | None = None
    """Width between the layers; None: the LLM's hidden size."""
    activation: Literal["gelu", "gelu_tanh", "silu"] = "gelu"
    bias: bool = True
    pixel_shuffle: PositiveInt = 1
    """Merge pixel_shuffle x pixel_shuffle neighbouring patches into one token before the projection (InternVL and Qwen-VL use 2)."""
    image_newline: bool = False
    """A learned token at the end of each row of patches, for data.image.policy=anyres (LLaVA-NeXT)."""
    input_norm: bool = False
    """A LayerNorm on the (shuffled) features before the first linear layer (InternVL)."""
