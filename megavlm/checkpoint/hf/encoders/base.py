"""What a vision encoder of transformers is to us: one object an encoder class, used by every family that contains it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from megavlm.checkpoint.hf.links import Link
from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import VisionConfig

HF_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}


class EncoderKind(ABC):
    """A Hugging Face vision encoder class."""

    model_type: ClassVar[str]
    """`model_type` of its config."""
    mean: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    """Pixel statistics that the family uses when its folder has no processor."""
    std: ClassVar[tuple[float, float, float]] = (0.5, 0.5, 0.5)
    renames: ClassVar[tuple[tuple[str, str], ...]] = ()
    """(regular expression, replacement) from names of live modules to those that transformers 5 writes to disk."""

    @abstractmethod
    def from_hf(self, config: Any, problems: Problems) -> dict[str, Any]:
        """Fields of VisionConfig that follow from the encoder's own config; feature layer and statistics are the family's business."""

    @abstractmethod
    def to_hf(self, vision: VisionConfig) -> dict[str, Any]:
        """The encoder's config block. It need not refuse anything: an export is compared with what reading it back gives."""

    @abstractmethod
    def links(self, vision: VisionConfig) -> list[Link]:
        """All weights, our keys relative to `vision.`, Hugging Face's names relative to the encoder."""


def square(config: Any, field: str, problems: Problems) -> int:
    """A side in pixels that a config may write as (height, width); a problem is noted when the two differ."""
    value = getattr(config, field)
    sides = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(set(sides)) != 1:
        problems.add(f"vision_config.{field} is {list(sides)}, supported: a square")
    return int(sides[0])


def vit_sizes(config: Any, problems: Problems) -> dict[str, Any]:
    """Fields of VisionConfig by the names that most encoders use for their sizes."""
    return {
        "image_size_px": square(config, "image_size", problems),
        "patch_size_px": square(config, "patch_size", problems),
        "num_channels": config.num_channels,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
    }


def vit_sizes_block(vision: VisionConfig, model_type: str) -> dict[str, Any]:
    """The way back of `vit_sizes`, with the model's type."""
    return {
        "model_type": model_type,
        "image_size": vision.image_size_px,
        "patch_size": vision.patch_size_px,
        "num_channels": vision.num_channels,
        "num_hidden_layers": vision.num_layers,
        "hidden_size": vision.hidden_size,
        "num_attention_heads": vision.num_attention_heads,
    }


def hf_activation(vision: VisionConfig) -> str:
    """The activation by transformers' name.

    Raises:
        ValueError: transformers' encoders have none such.
    """
    for theirs, ours in HF_ACTIVATIONS.items():
        if ours == vision.activation:
            return theirs
    raise ValueError(f"vision.activation={vision.activation} has no name among hidden_act's {', '.join(HF_ACTIVATIONS)}")
