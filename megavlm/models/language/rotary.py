"""Rotary positions of the LLM: frequencies by family, and their cos and sin once a microbatch.

Shape legend: S packed sequence, W rotated width of a head.
"""

from __future__ import annotations

import torch

from megavlm.config.schema import LanguageConfig

Tables = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Name -> cos and sin, each (S, W): "global", and "local" for layers with a sliding window where these have their own base."""


def rotary_tables(language: LanguageConfig, positions_S: torch.Tensor, dtype: torch.dtype) -> Tables:
    """cos and sin of rotary embeddings (https://arxiv.org/abs/2104.09864) in the half-split order of Llama."""
    if language.positions != "rotary":
        return {}
    tables = {"global": _cos_sin(positions_S, frequencies(language.rope_theta, language.rotary_width, positions_S.device), dtype)}
    if language.rope_local_theta is not None:
        local = frequencies(language.rope_local_theta, language.rotary_width, positions_S.device)
        tables["local"] = _cos_sin(positions_S, local, dtype)
    return tables


def frequencies(theta: float, width: int, device: torch.device) -> torch.Tensor:
    """Radians a position, (W / 2)."""
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device=device) / width
    return 1.0 / theta**exponent


def _cos_sin(positions_S: torch.Tensor, frequency: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    angle = positions_S.float()[:, None] * frequency[None, :]
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)
