"""Block-diagonal attention, by the best backend that is there.

Shape legend: L query rows, S key rows, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

import torch

from megavlm_kernels.packed_attention.backends import KERNELS, run_packed
from megavlm_kernels.packed_attention.machine import call_of, machine_of
from megavlm_kernels.packed_attention.sdpa import sdpa_attention
from megavlm_kernels.packed_attention.segments import Segments
from megavlm_kernels.packed_attention.selection import choose


def packed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention inside each segment: (L, H, K), (S, G, K), (S, G, K) -> (L, H, K); empty segments are allowed.

    Args:
        scale: of the scores; None: 1 / sqrt(K).
        window: tokens that a row sees, itself included; causal attention only, as are the segments' own masks.
        softcap: scores become softcap x tanh(score / softcap).
        backend: auto, or one of `BACKENDS`.

    Raises:
        ValueError: the segments do not cover the rows, or are no causal ones.
        BackendError: `backend` cannot serve the call; says why.
    """
    segments.check(query.shape[0], key.shape[0])
    if causal and not segments.fits_causal:
        raise ValueError("causal attention aligns the ends of queries and keys: a segment has more queries than keys")
    if not causal and (window is not None or segments.masked):
        raise ValueError("windows and masks are for causal attention")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if query.is_cuda or backend not in ("auto", "sdpa"):
        machine = machine_of(query.device.type, query.device.index)
        choice = choose(call_of(query, segments, window, softcap), machine, backend)
        if choice.backend != "sdpa":
            kernel = KERNELS[f"flash_attn_{choice.flash_attn}" if choice.backend == "flash_attn" else choice.backend]
            return run_packed(kernel, query, key, value, segments, causal=causal, scale=scale, window=window, softcap=softcap)
    return sdpa_attention(query, key, value, segments, causal=causal, scale=scale, window=window, softcap=softcap)
