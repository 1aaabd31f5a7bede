"""Sliding windows of Hugging Face configs, both ways: in all layers, or layer by layer (`layer_types`)."""

from __future__ import annotations

from typing import Any

from megavlm.checkpoint.hf.reading import Problems
from megavlm.config.schema import LanguageConfig

SLIDING, FULL = "sliding_attention", "full_attention"


def everywhere_fields(config: Any) -> dict[str, Any]:
    """Fields of LanguageConfig where `sliding_window` counts for all layers; None: no window."""
    if config.sliding_window is None:
        return {}
    return {"sliding_window_tokens": config.sliding_window, "sliding_layers": list(range(config.num_hidden_layers))}


def everywhere_block(language: LanguageConfig) -> dict[str, Any]:
    """The way back; a model with a window in some layers only is not what this says."""
    return {"sliding_window": language.sliding_window_tokens if language.sliding_layers else None}


def layerwise_fields(config: Any, problems: Problems) -> dict[str, Any]:
    """Fields of LanguageConfig from `layer_types`."""
    types = list(getattr(config, "layer_types", None) or [FULL] * config.num_hidden_layers)
    unknown = sorted(set(types) - {SLIDING, FULL})
    if unknown:
        problems.add(f"text_config.layer_types has {', '.join(unknown)}, supported: {SLIDING}, {FULL}")
    layers = [layer for layer, kind in enumerate(types) if kind == SLIDING]
    return {"sliding_window_tokens": config.sliding_window, "sliding_layers": layers} if layers else {}


def layerwise_block(language: LanguageConfig) -> dict[str, Any]:
    """The way back, for classes that also want to be told that there is a window (`use_sliding_window`)."""
    slides = set(language.sliding_layers)
    return {
        "use_sliding_window": bool(slides),
        "sliding_window": language.sliding_window_tokens if slides else None,
        "max_window_layers": language.num_layers,
        "layer_types": [SLIDING if layer in slides else FULL for layer in range(language.num_layers)],
    }
