"""Rotary positions of the LLM: frequencies by family, and their cos and sin once a microbatch.

Shape legend: S packed sequence, W rotated width of a head, F rotation pairs (W / 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megavlm.config.schema import LanguageConfig
from megavlm.models.language.mrope import pair_positions
from megavlm.models.language.rope_scaling import BY_LENGTH, Scaled, scaled_frequencies
from megavlm.parallel.host import numbers_of_rows

Tables = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name -> cos and sin, each (S, W): "global", and "local" for layers with a sliding window where these have their own base."""


def rotary_tables(
    language: LanguageConfig,
    positions_S: torch.Tensor,
    dtype: torch.dtype,
    segment_lengths: Sequence[int] | None = None,
    axes_3S: torch.Tensor | None = None,
) -> Tables:
    """cos and sin of rotary embeddings (https://arxiv.org/abs/2104.09864) in the half-split order of Llama.

    Scalings that depend on a sequence's length take that of each row's segment; `segment_lengths` None: it is all one segment.
    `axes_3S` are time, row and column where language.mrope_sections splits the pairs among them (mrope.py); None: all are `positions_S`.
    """
    if language.positions != "rotary":
        return {}
    plain_F = frequencies(language.rope_theta, language.rotary_width, positions_S.device)
    scaling = language.rope_scaling
    reach_S = segment_reach(positions_S, segment_lengths) if scaling is not None and scaling.kind in BY_LENGTH else None
    turned = positions_S
    if axes_3S is not None and language.mrope_sections is not None:
        turned = pair_positions(axes_3S, language.mrope_sections, language.mrope_interleaved)
    tables = {"global": _cos_sin(turned, scaled_frequencies(language, plain_F, reach_S), dtype)}
    if language.rope_local_theta is not None:
        local_F = frequencies(language.rope_local_theta, language.rotary_width, positions_S.device)
        tables["local"] = _cos_sin(positions_S, (local_F, 1.0), dtype)
    return tables


def frequencies(theta: float, width: int, device: torch.device) -> torch.Tensor:
    """Radians a position, (F)."""
    exponent_F = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / theta**exponent_F


def segment_reach(positions_S: torch.Tensor, segment_lengths: Sequence[int] | None) -> torch.Tensor:
    """For each row, one more than the last position of its segment: the sequence's length, also where only its last token is here."""
    if segment_lengths is None:
        return (positions_S.max() + 1).expand_as(positions_S)
    segment_S = numbers_of_rows(segment_lengths, positions_S.device)
    last = positions_S.new_zeros(len(segment_lengths)).scatter_reduce(0, segment_S, positions_S, "amax")
    return last[segment_S] + 1


def _cos_sin(positions: torch.Tensor, scaled: Scaled, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`positions` are (S), or (S, F) where each pair has its own."""
    frequency, factor = scaled
    angle = (positions.float() if positions.dim() == 2 else positions.float()[:, None]) * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return (angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype)
