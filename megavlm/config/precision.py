"""Number formats of a run: parameters, activations, gradients, matrix products."""

from __future__ import annotations

from typing import Literal

from megavlm.config.blocks import Block


class PrecisionConfig(Block):
    """Number formats."""

    dtype: Literal["fp32", "bf16"] = "bf16"
    """Format of parameters and activations in forward and backward. bf16 keeps fp32 master weights in the optimizer."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    attention: Literal["auto", "sdpa", "varlen", "flash_attn", "transformer_engine"] = "auto"
    """What computes attention inside the segments of a pack. auto: the fastest that is there and can: FlashAttention 3, Transformer Engine,
    FlashAttention 2, torch's varlen attention, and for fp32, masks and a CPU torch's scaled_dot_product_attention, a call a segment.
    Another name is that one or an error that says why not; `megavlm doctor` lists what this machine has."""
