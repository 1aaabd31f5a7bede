"""Rotary frequencies beyond the length of the first training. Source of the formulas: transformers 5.23, modeling_rope_utils.py.

Shape legend: S packed sequence, F rotation pairs of a head (half its rotated width).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from megavlm.config.schema import LanguageConfig

Scaled = tuple[torch.Tensor, float]
"""Radians a position, (F) or for each row (S, F), and what cos and sin are multiplied by."""
BY_LENGTH = ("dynamic", "longrope")
"""Kinds whose frequencies follow the length of a row's segment."""


def scaled_frequencies(language: LanguageConfig, plain_F: torch.Tensor, reach_S: torch.Tensor | None) -> Scaled:
    """The plain frequencies, scaled as model.language.rope_scaling says; `reach_S` is each row's length of its segment (`BY_LENGTH`)."""
    scaling = language.rope_scaling
    if scaling is None:
        return plain_F, 1.0
    if scaling.kind in BY_LENGTH:
        assert reach_S is not None, f"rope_scaling.kind={scaling.kind} needs the segments' lengths"
        return _LENGTH_KINDS[scaling.kind](language, scaling.parameters, plain_F, reach_S)
    return _KINDS[scaling.kind](language, scaling.parameters, plain_F)


def powers(language: LanguageConfig, device: torch.device) -> torch.Tensor:
    """rope_theta to the powers of which plain frequencies are the inverses, (F).

    Scalings divide these where transformers does: at position 100000 the last bit of a frequency is a hundredth of a radian.
    """
    exponent_F = torch.arange(0, language.rotary_width, 2, dtype=torch.float32, device=device) / language.rotary_width
    return language.rope_theta**exponent_F


def _linear(language: LanguageConfig, parameters: dict[str, Any], plain_F: torch.Tensor) -> Scaled:
    """Position interpolation (https://arxiv.org/abs/2306.15595)."""
    return plain_F / parameters["factor"], 1.0


def _dynamic(language: LanguageConfig, parameters: dict[str, Any], plain_F: torch.Tensor, reach_S: torch.Tensor) -> Scaled:
    """NTK-aware: beyond max_positions the base grows with the segment's length; up to there nothing changes."""
    width, factor = language.rotary_width, parameters["factor"]
    stretch_S = factor * reach_S.clamp(min=language.max_positions).float() / language.max_positions - (factor - 1)
    base_S = language.rope_theta * stretch_S ** (width / (width - 2))
    exponent_F = torch.arange(0, width, 2, dtype=torch.float32, device=plain_F.device) / width
    return 1.0 / base_S[:, None] ** exponent_F, 1.0


def _llama3(language: LanguageConfig, parameters: dict[str, Any], plain_F: torch.Tensor) -> Scaled:
    """Llama 3.1 (https://arxiv.org/abs/2407.21783): long waves are divided by the factor, short ones stay, with a ramp between them."""
    factor, low, high = parameters["factor"], parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns_F = parameters["original_max_position_embeddings"] * plain_F / (2 * math.pi)  # over the length of the first training
    smooth_F = ((turns_F - low) / (high - low)).clamp(0.0, 1.0)
    return (1 - smooth_F) * plain_F / factor + smooth_F * plain_F, 1.0


def _yarn(language: LanguageConfig, parameters: dict[str, Any], plain_F: torch.Tensor) -> Scaled:
    """YaRN (https://arxiv.org/abs/2309.00071)."""
    width, original = language.rotary_width, parameters["original_max_position_embeddings"]
    factor = parameters.get("factor") or language.max_positions / original

    def pair_of(turns: float) -> float:
        """The rotation pair that makes so many turns over the length of the first training."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(language.rope_theta))

    low, high = pair_of(parameters.get("beta_fast") or 32), pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    pairs_F = torch.arange(width // 2, dtype=torch.float32, device=plain_F.device)
    kept_F = 1 - ((pairs_F - low) / (high - low if high != low else 0.001)).clamp(0.0, 1.0)
    attention = parameters.get("attention_factor")
    if attention is None:
        own, every = parameters.get("mscale"), parameters.get("mscale_all_dim")
        attention = _mscale(factor, own) / _mscale(factor, every) if own and every else _mscale(factor, 1.0)
    return 1.0 / (factor * powers(language, plain_F.device)) * (1 - kept_F) + plain_F * kept_F, attention


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _longrope(language: LanguageConfig, parameters: dict[str, Any], plain_F: torch.Tensor, reach_S: torch.Tensor) -> Scaled:
    """LongRoPE (https://arxiv.org/abs/2402.13753): a factor for each pair, others in segments beyond the first training's length."""
    original, attention = parameters["original_max_position_embeddings"], parameters.get("attention_factor")
    factor = parameters.get("factor") or language.max_positions / original
    if attention is None:
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    short_F, long_F = (
        torch.tensor(parameters[name], dtype=torch.float32, device=plain_F.device) for name in ("short_factor", "long_factor")
    )
    return 1.0 / (torch.where((reach_S > original)[:, None], long_F, short_F) * powers(language, plain_F.device)), attention


_KINDS: dict[str, Callable[[LanguageConfig, dict[str, Any], torch.Tensor], Scaled]] = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
_LENGTH_KINDS: dict[str, Callable[[LanguageConfig, dict[str, Any], torch.Tensor, torch.Tensor], Scaled]] = {
    "dynamic": _dynamic,
    "longrope": _longrope,
}
