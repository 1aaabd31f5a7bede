"""Number formats of a run: parameters, activations, gradients, matrix products."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megavlm.config.blocks import Block, PositiveFloat, PositiveInt


class LossScaleConfig(Block):
    """The dynamic loss scale of fp16, which keeps small gradients from vanishing.

    The loss is multiplied by the scale before the backward pass and gradients are divided by it before the update (Micikevicius et al.
    2018, https://arxiv.org/abs/1710.03740, section 3.2). A step whose gradients overflow is skipped: no weight changes, and the learning
    rate's schedule waits, so that it always has its whole length in updates.
    """

    initial: PositiveFloat = 4096.0
    """Scale of the first step. The loss is a sum over targets, so its gradients are larger than those of a mean."""
    minimum: PositiveFloat = 1.0
    """Never halved below this; a step that overflows at this scale ends the run."""
    window_steps: PositiveInt = 1000
    """Updates in a row without overflow after which the scale is doubled."""
    hysteresis: PositiveInt = 1
    """Overflowing steps before the scale is halved."""

    @model_validator(mode="after")
    def _check(self) -> LossScaleConfig:
        if self.minimum > self.initial:
            raise ValueError(f"minimum={self.minimum:g} exceeds initial={self.initial:g}: the scale never falls below minimum")
        return self


class PrecisionConfig(Block):
    """Number formats."""

    dtype: Literal["fp32", "bf16", "fp16"] = "bf16"
    """Format of parameters and activations in forward and backward. bf16 and fp16 keep fp32 master weights in the optimizer; fp16, for
    GPUs without bf16, scales the loss."""
    grad_reduce_in_fp32: bool = True
    """Accumulate and reduce gradients in fp32."""
    attention: Literal["auto", "sdpa", "varlen", "flash_attn", "transformer_engine"] = "auto"
    """What computes attention inside the segments of a pack. auto: the fastest that is there and can: FlashAttention 3, Transformer Engine,
    FlashAttention 2, torch's varlen attention, and for fp32, masks and a CPU torch's scaled_dot_product_attention, a call a segment.
    Another name is that one or an error that says why not; `megavlm doctor` lists what this machine has."""
    loss_scale: LossScaleConfig = Field(default_factory=LossScaleConfig)
    """Only with dtype=fp16."""

    @model_validator(mode="after")
    def _check(self) -> PrecisionConfig:
        if self.dtype != "fp16" and self.loss_scale != LossScaleConfig():
            raise ValueError(f"loss_scale is for dtype=fp16, and dtype is {self.dtype}: leave loss_scale out")
        return self
