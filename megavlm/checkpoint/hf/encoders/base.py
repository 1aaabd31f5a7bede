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
