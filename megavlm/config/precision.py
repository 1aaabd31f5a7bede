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
