"""A Hugging Face folder that holds an encoder alone, or an encoder beside a text tower (CLIP, SigLIP)."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.encoders import ENCODERS
from megavlm.checkpoint.hf.links import Link
from megavlm.checkpoint.hf.processors import pixel_statistics
from megavlm.checkpoint.hf.reading import CONFIG, Problems, hf_config, read_json
from megavlm.config.schema import VisionConfig

TOWERS = {"clip": "clip_vision_model", "siglip": "siglip_vision_model", "siglip2": "siglip2_vision_model"}
"""`model_type` of a folder with two towers -> that of its encoder."""
_INSIDE = re.compile(r"^(vision_model|dinov2_with_registers|dinov2)\.")
"""Prefixes under which folders of larger models keep the encoder."""
_OTHERS = re.compile(r"^(text_model\.|text_projection\.|visual_projection\.|logit_scale$|logit_bias$|classifier\.)")
"""Weights of such folders that belong to no encoder."""
_BUFFERS = re.compile(r"position_ids$")
"""A constant that old releases stored among the weights."""


class EncoderFolder(NamedTuple):
    """What loading an encoder needs to know."""

    fields: dict[str, Any]
    """Of VisionConfig: the network and its pixel statistics. Which features are taken is the recipe's choice."""
    links: list[Link]
    """Our keys relative to `vision.`, names as `disk_name` gives them."""
    disk_name: Callable[[str], str | None]
    """A tensor's name in the folder -> its name in `links`; None: it is no part of the encoder."""


def encoder_folder(folder: str | Path) -> EncoderFolder:
    """Read the config of an encoder's folder: CLIP, SigLIP, SigLIP2, DINOv2 or InternViT, alone or with its text tower.

    Raises:
        HuggingFaceError: the folder holds none of these, or a setting that the encoder here does not have, named with its value.
    """
    folder = Path(folder)
    config: Any = hf_config(read_json(folder / CONFIG))
    model_type = config.model_type
    if model_type in TOWERS:
        model_type, config = TOWERS[model_type], config.vision_config
    if model_type not in ENCODERS:
        known = ", ".join([*ENCODERS, *TOWERS])
        raise HuggingFaceError(f"{folder / CONFIG}: model_type={model_type!r} is none of the encoders here: {known}")
    kind, problems = ENCODERS[model_type], Problems()
    fields = kind.from_hf(config, problems)
    problems.check(folder / CONFIG)
    mean, std = pixel_statistics(folder) or (kind.mean, kind.std)
    fields |= {"image_mean": mean, "image_std": std}

    def disk_name(name: str) -> str | None:
        if _OTHERS.search(name) or _BUFFERS.search(name):
            return None
        name = _INSIDE.sub("", name)
        for pattern, replacement in kind.renames:
            name = re.sub(pattern, replacement, name)
        return name

    return EncoderFolder(fields, kind.links(VisionConfig(**fields)), disk_name)
