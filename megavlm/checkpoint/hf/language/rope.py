"""Rotary settings of Hugging Face configs (`rope_parameters`), both ways."""

from __future__ import annotations

from typing import Any

from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.language import ROPE_PARAMETERS
from megavlm.config.schema import LanguageConfig


def rope_fields(config: Any, problems: Problems, *, partial: bool = False) -> dict[str, Any]:
    """Base and scaling as fields of LanguageConfig; with `partial` also the rotated part of a head, which other classes lack."""
    rope = getattr(config, "rope_parameters", None) or {}
    fraction = rope.get("partial_rotary_factor") or 1.0
    if not partial and fraction != 1.0:
        problems.add(f"text_config.rope_parameters.partial_rotary_factor is {fraction}, supported: 1.0")
    fields = {"rope_theta": float(rope.get("rope_theta") or 10000.0), "rope_scaling": _scaling(rope, problems)}
    return fields | ({"rotary_fraction": fraction} if partial else {})


def rope_block(language: LanguageConfig) -> dict[str, Any]:
    """`rope_parameters` of a config."""
    scaling = language.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": language.rope_theta}
    return {"rope_type": scaling.kind, "rope_theta": language.rope_theta, **scaling.parameters}


def _scaling(rope: dict[str, Any], problems: Problems) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    if kind not in ROPE_PARAMETERS:
        problems.add(f"text_config.rope_parameters.rope_type is {kind!r}, supported: default, {', '.join(ROPE_PARAMETERS)}")
        return None
    required, optional = ROPE_PARAMETERS[kind]
    return {"kind": kind, "parameters": {name: rope[name] for name in required | optional if rope.get(name) is not None}}
