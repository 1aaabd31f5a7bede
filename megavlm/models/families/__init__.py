"""Model families: what a family's checkpoints hold besides the weights that the forward pass reads."""

from __future__ import annotations

from collections.abc import Callable

from megavlm.config.schema import ModelConfig
from megavlm.models.families import llava

_CARRIED: dict[str, Callable[[ModelConfig], dict[str, tuple[int, ...]]]] = {"llava": llava.carried_shapes}


def carried_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name (relative to the encoder) and shape of the encoder's weights that are carried along unused."""
    return _CARRIED[model.family](model)
