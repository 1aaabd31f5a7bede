"""Vision encoders of transformers, one small class each."""

from __future__ import annotations

from typing import Any

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.encoders.base import EncoderKind
from megavlm.checkpoint.hf.encoders.blip import Blip2Vision, InstructBlipVision
from megavlm.checkpoint.hf.encoders.clip import Clip, Siglip
from megavlm.checkpoint.hf.encoders.dinov2 import Dinov2, Dinov2WithRegisters
from megavlm.checkpoint.hf.encoders.idefics import Idefics2Vision, Idefics3Vision, SmolVLMVision
from megavlm.checkpoint.hf.encoders.internvit import InternViT
from megavlm.checkpoint.hf.encoders.pixtral import Pixtral
from megavlm.checkpoint.hf.encoders.siglip2 import Siglip2
from megavlm.checkpoint.hf.holding import which_holds
from megavlm.checkpoint.hf.reading import Problems, hf_config
from megavlm.config.schema import VisionConfig

ENCODERS: dict[str, EncoderKind] = {
    kind.model_type: kind
    for kind in (
        Clip(),
        Siglip(),
        Siglip2(),
        Dinov2(),
        Dinov2WithRegisters(),
        InternViT(),
        Idefics2Vision(),
        Idefics3Vision(),
        SmolVLMVision(),
        Pixtral(),
        Blip2Vision(),
        InstructBlipVision(),
    )
}

_FAMILYS_BUSINESS = {"feature_layer", "final_norm", "keep_class_token", "pooled", "image_mean", "image_std"}


def encoder(model_type: str, allowed: tuple[str, ...] | None = None) -> EncoderKind:
    """The encoder of a vision config's model_type. Raises HuggingFaceError when there is none (or none that the family takes)."""
    names = allowed or tuple(ENCODERS)
    if model_type not in names:
        raise HuggingFaceError(f"vision_config.model_type is {model_type!r}, supported: {', '.join(names)}")
    return ENCODERS[model_type]


def encoder_of(vision: VisionConfig, allowed: tuple[str, ...] | None = None) -> EncoderKind:
    """The transformers class that can hold this encoder. Raises HuggingFaceError with what the nearest class would lose."""
    kinds = [ENCODERS[name] for name in allowed or tuple(ENCODERS)]

    def back(kind: EncoderKind) -> dict[str, Any]:
        problems = Problems()
        fields = kind.from_hf(hf_config(kind.to_hf(vision)), problems)
        problems.check("model.vision")
        kept = {name: getattr(vision, name) for name in _FAMILYS_BUSINESS}
        return VisionConfig(**(kept | fields)).model_dump()

    return which_holds("model.vision", vision.model_dump(), {kind.model_type: kind for kind in kinds}, back)
