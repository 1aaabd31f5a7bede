"""CUDA kernels for packed sequences: torch's varlen, flash-attn 2 and 3, Transformer Engine; each behind the same arguments.

What they share is here once: heads of any width are filled up with zeros to a multiple of 8, keys that segments share are laid out
segment after segment, and the window (tokens that a row sees, itself included) becomes FlashAttention's (rows before, rows after).
All of them align the last query of a segment to its last key.

Shape legend: L query rows, S key rows, H heads, G key/value heads, K head width.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F

from megavlm_kernels.packed_attention.sdpa import repeated
from megavlm_kernels.packed_attention.segments import Segments

WIDTH_MULTIPLE = 8
"""Head widths that FlashAttention and cuDNN take."""


@dataclass(frozen=True)
class PackedCall:
    """What every kernel below is called with: rows of segments end to end."""

    query: torch.Tensor
    """(L, H, K)."""
    key: torch.Tensor
    """(S, G, K)."""
    value: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool
    scale: float
    window: tuple[int, int]
    """FlashAttention's: rows before and after a row that it sees, -1 is all."""
    softcap: float | None
    is_square: bool
    """Every segment has as many keys as queries."""

    @property
    def by_place(self) -> tuple[Any, ...]:
        """The seven arguments that FlashAttention and torch's varlen take first."""
        return self.query, self.key, self.value, self.cu_seqlens_q, self.cu_seqlens_k, self.longest_query, self.longest_key


Kernel = Callable[[PackedCall], torch.Tensor]


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
        PackedCall(
            query,
            key,
            value,
            bounds.cu_seqlens_q,
            bounds.cu_seqlens_k,
            segments.longest_query,
            segments.longest_key,
            causal,
            scale,
            (-1 if window is None else window - 1, 0) if causal else (-1, -1),
            softcap,
            segments.is_square,
        )
    )
    return out[..., :width] if out.shape[-1] != width else out


def varlen_kernel(call: PackedCall) -> torch.Tensor:
    """torch.nn.attention.varlen; causal is said by the window."""
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {}
    if call.query.shape[1] != call.key.shape[1]:
        if "enable_gqa" in _parameters(varlen_attn):
            options["enable_gqa"] = True
        else:
            key, value = repeated(call.key, call.value, call.query.shape[1], dim=1)
            call = replace(call, key=key, value=value)
    out: Any = varlen_attn(*call.by_place, scale=call.scale, window_size=call.window, **options)
    return out


def flash_attn_kernel(call: PackedCall, module: str) -> torch.Tensor:
    """flash_attn_varlen_func of `module`: flash_attn is version 2, flash_attn_interface version 3."""
    function = importlib.import_module(module).flash_attn_varlen_func
    options: dict[str, Any] = {"softmax_scale": call.scale, "causal": call.causal, "window_size": call.window}
    if call.softcap is not None:
        options["softcap"] = call.softcap
    if "deterministic" in _parameters(function):
        options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    out: Any = function(*call.by_place, **options)
    # Some releases of version 3 return the log-sum-exp too.
    return out[0] if isinstance(out, tuple) else out


def transformer_engine_kernel(call: PackedCall) -> torch.Tensor:
    """Transformer Engine's DotProductAttention over (rows, heads, width)."""
    mask = "padding" if not call.causal else "padding_causal" if call.is_square else "padding_causal_bottom_right"
    _, heads, width = call.query.shape
    module = _dot_product_attention(heads, call.key.shape[1], width, call.scale, torch.are_deterministic_algorithms_enabled())
    out: torch.Tensor = module(
        # Its check of the three's layout wants each to be contiguous.
        call.query.contiguous(),
        call.key.contiguous(),
        call.value.contiguous(),
        qkv_format="thd",
        cu_seqlens_q=call.cu_seqlens_q,
        cu_seqlens_kv=call.cu_seqlens_k,
        max_seqlen_q=call.longest_query,
        max_seqlen_kv=call.longest_key,
        attn_mask_type=mask,
        window_size=call.window,
    )
    return out.view(call.query.shape)


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
    "flash_attn_2": partial(flash_attn_kernel, module="flash_attn"),
    "flash_attn_3": partial(flash_attn_kernel, module="flash_attn_interface"),
    "transformer_engine": transformer_engine_kernel,
}
