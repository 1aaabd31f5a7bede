"""CUDA kernels for packed sequences: torch's varlen, flash-attn 2 and 3, Transformer Engine; each behind the same arguments.

What they share is here once: heads of any width are filled up with zeros to a multiple of 8, keys that segments share are laid out
segment after segment, and the window (tokens that a row sees, itself included) becomes FlashAttention's (rows before, rows after).
All of them align the last query of a segment to its last key.

Shape legend: L query rows, S key rows, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from megavlm_kernels.packed_attention.sdpa import repeated
from megavlm_kernels.packed_attention.segments import Segments

WIDTH_MULTIPLE = 8
"""Head widths that FlashAttention and cuDNN take."""
Kernel = Callable[..., torch.Tensor]


def run_packed(
    kernel: Kernel,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """(L, H, K), (S, G, K), (S, G, K) -> (L, H, K) by one of the kernels below."""
    bounds, width = segments.bounds(query.device), query.shape[-1]
    if bounds.key_rows is not None:
        key, value = key[bounds.key_rows], value[bounds.key_rows]
    if width % WIDTH_MULTIPLE:
        query, key, value = (F.pad(x, (0, -width % WIDTH_MULTIPLE)) for x in (query, key, value))
    out = kernel(
        query,
        key,
        value,
        bounds.cu_seqlens_q,
        bounds.cu_seqlens_k,
        segments.longest_query,
        segments.longest_key,
        causal=causal,
        scale=scale,
        window=window_sides(causal, window),
        softcap=softcap,
        is_square=segments.is_square,
    )
    return out[..., :width] if out.shape[-1] != width else out


def window_sides(causal: bool, window: int | None) -> tuple[int, int]:
    """FlashAttention's window: rows before and after a row that it sees, -1 is all."""
    return (-1 if window is None else window - 1, 0) if causal else (-1, -1)


def varlen_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    scale: float,
    window: tuple[int, int],
    **_: Any,
) -> torch.Tensor:
    """torch.nn.attention.varlen; causal is said by the window."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if q.shape[1] != k.shape[1]:
        if "enable_gqa" in _parameters(varlen_attn):
            options["enable_gqa"] = True
        else:
            k, v = repeated(k, v, q.shape[1], dim=1)
    out: Any = varlen_attn(q, k, v, cu_q, cu_k, longest_q, longest_k, scale=scale, window_size=window, **options)
    return out


def flash_attn_2_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    causal: bool,
    scale: float,
    window: tuple[int, int],
    softcap: float | None,
    **_: Any,
) -> torch.Tensor:
    """flash_attn.flash_attn_varlen_func."""
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

    return _flash(flash_attn_varlen_func, (q, k, v, cu_q, cu_k, longest_q, longest_k), causal, scale, window, softcap)


def flash_attn_3_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    causal: bool,
    scale: float,
    window: tuple[int, int],
    softcap: float | None,
    **_: Any,
) -> torch.Tensor:
    """flash_attn_interface.flash_attn_varlen_func."""
    from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found]

    return _flash(flash_attn_varlen_func, (q, k, v, cu_q, cu_k, longest_q, longest_k), causal, scale, window, softcap)


def _flash(function: Any, inputs: tuple[Any, ...], causal: bool, scale: float, window: tuple[int, int], softcap: float | None) -> Any:
    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "window_size": window}
    if softcap is not None:
        options["softcap"] = softcap
    if "deterministic" in _parameters(function):
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    out = function(*inputs, **options)
    # Some releases of version 3 return the log-sum-exp too.
    return out[0] if isinstance(out, tuple) else out


def transformer_engine_kernel(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    longest_q: int,
    longest_k: int,
    *,
    causal: bool,
    scale: float,
    window: tuple[int, int],
    is_square: bool,
    **_: Any,
) -> torch.Tensor:
    """Transformer Engine's DotProductAttention over (rows, heads, width)."""
    mask = "padding" if not causal else "padding_causal" if is_square else "padding_causal_bottom_right"
    module = _dot_product_attention(q.shape[1], k.shape[1], q.shape[2], scale, torch.are_deterministic_algorithms_enabled())
    out: torch.Tensor = module(
        # Its check of the three's layout wants each to be contiguous.
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        qkv_format="thd",
        cu_seqlens_q=cu_q,
        cu_seqlens_kv=cu_k,
        max_seqlen_q=longest_q,
        max_seqlen_kv=longest_k,
        attn_mask_type=mask,
        window_size=window,
    )
    return out.view(q.shape)


@lru_cache(maxsize=64)
def _dot_product_attention(heads: int, groups: int, width: int, scale: float, _deterministic: bool) -> Any:
    """A module without weights. Whether it must be deterministic it asks torch when it is made."""
    from transformer_engine.pytorch import DotProductAttention

    return DotProductAttention(
        num_attention_heads=heads,
        kv_channels=width,
        num_gqa_groups=groups,
        attention_dropout=0.0,
        qkv_format="thd",
        attn_mask_type="padding_causal",
        softmax_scale=scale,
    )


@lru_cache(maxsize=16)
def _parameters(function: Any) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


KERNELS: dict[str, Kernel] = {
    "varlen": varlen_kernel,
    "flash_attn_2": flash_attn_2_kernel,
    "flash_attn_3": flash_attn_3_kernel,
    "transformer_engine": transformer_engine_kernel,
}
