"""Number formats of a run: parameters, activations, gradients, matrix products."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megavlm.config.blocks import Block, NonNegativeInt, PositiveFloat, PositiveInt


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


Keepable = Literal["vision", "projector", "language", "attention", "mlp"]


def _kept() -> list[Keepable]:
    return ["projector"]


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
    compile_encoder: bool = False
    """Compile the MLP half of the encoder's layers (norm, products, biases, activation, residual) with torch.compile: one graph for all
    layers and any number of pictures, made in the first step, which takes up to a minute longer. These layers are then megatron-core's own,
    also where Transformer Engine is there. Not for layers in FP8 or split over tensor ranks. Off until measured."""

    fp8: Literal["none", "delayed", "current", "rowwise", "blockwise"] = "none"
    """Multiply linear layers in FP8, with scales of: delayed, the largest values of the last steps (Transformer Engine; not for the
    encoder); current, each tensor's own; rowwise, each row's own (torch._scaled_mm); blockwise, each block's of 128 (Transformer Engine,
    Hopper). Parameters, activations between layers, gradients and checkpoints stay in dtype, which must be bf16. GPUs from compute
    capability 8.9 on; a CPU computes the same, slowly."""
    fp8_format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: activations and weights in e4m3, gradients in e5m2, which reaches further. e4m3: gradients too, which is finer; for current,
    rowwise and blockwise."""
    fp8_backend: Literal["auto", "transformer_engine", "scaled_mm"] = "auto"
    """auto: Transformer Engine where it is there and can, else torch._scaled_mm under megatron-core's own layers. `megavlm doctor` and
    --dry-run tell which."""
    fp8_amax_history_len: PositiveInt = 1024
    """Steps whose largest values set the scale of fp8=delayed. The history is no part of a checkpoint: it begins anew with a resume."""
    fp8_amax_compute_algo: Literal["max", "most_recent"] = "max"
    """What fp8=delayed takes from the history."""
    keep_bf16: list[Keepable] = Field(default_factory=_kept)
    """Linear layers that stay out of FP8: all of a module, or of every transformer layer those around attention (query, key, value,
    output) or those of the MLP and the experts. What is no linear layer of these always stays: patch embedding, token and position
    embeddings, norms, attention itself, routers, pooling heads, the LM head and its loss."""
    num_layers_at_start_in_bf16: NonNegativeInt = 0
    """First layers of the encoder, and of the LLM, that stay out of FP8."""
    num_layers_at_end_in_bf16: NonNegativeInt = 0
    """Last layers of each that stay out of FP8."""

    @model_validator(mode="after")
    def _check(self) -> PrecisionConfig:
        if self.dtype != "fp16" and self.loss_scale != LossScaleConfig():
            raise ValueError(f"loss_scale is for dtype=fp16, and dtype is {self.dtype}: leave loss_scale out")
        if self.fp8 == "none":
            given = [name for name in _ONLY_WITH_FP8 if getattr(self, name) != _default(name)]
            if given:
                raise ValueError(f"{given[0]} needs FP8: set fp8 to delayed, current, rowwise or blockwise, or leave {given[0]} out")
            return self
        self._check_fp8()
        return self

    def _check_fp8(self) -> None:
        if self.dtype != "bf16":
            raise ValueError(f"fp8={self.fp8} needs dtype=bf16, and dtype is {self.dtype}")
        if self.fp8 != "delayed":
            for name in ("fp8_amax_history_len", "fp8_amax_compute_algo"):
                if getattr(self, name) != _default(name):
                    raise ValueError(f"{name} is for fp8=delayed, and fp8 is {self.fp8}: leave {name} out")
        own = {"delayed": "transformer_engine", "blockwise": "transformer_engine", "rowwise": "scaled_mm"}.get(self.fp8)
        if own is not None and self.fp8_backend not in ("auto", own):
            raise ValueError(f"fp8={self.fp8} is only in {own}: set fp8_backend to auto or {own}, or fp8 to current")
        kept = set(self.keep_bf16)
        if {"attention", "mlp"} <= kept or {"vision", "language", "projector"} <= kept:
            raise ValueError(f"keep_bf16=[{', '.join(self.keep_bf16)}] leaves nothing to multiply in FP8: set fp8=none, or keep less")
        if self.fp8 == "delayed":
            layers = self.num_layers_at_start_in_bf16 or self.num_layers_at_end_in_bf16
            if layers or kept & {"attention", "mlp"} or self.fp8_format != "hybrid":
                raise ValueError(
                    "fp8=delayed has one history for all layers of a module, in format hybrid: use fp8=current to keep single layers, "
                    "attention or mlp in bf16, or for fp8_format=e4m3"
                )

    @property
    def wants_local_layers(self) -> bool:
        """Layers of megatron-core's own, whose products are replaced, instead of Transformer Engine's."""
        return self.fp8 != "none" and self.fp8_backend == "scaled_mm"

    def without_fp8(self) -> PrecisionConfig:
        """The same with fp8=none and nothing compiled: what answers and exports are computed in."""
        return self.model_copy(update={"fp8": "none", "compile_encoder": False, **{name: _default(name) for name in _ONLY_WITH_FP8}})


_ONLY_WITH_FP8 = (
    "fp8_format",
    "fp8_backend",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "keep_bf16",
    "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16",
)


def _default(name: str) -> object:
    return PrecisionConfig.model_fields[name].get_default(call_default_factory=True)
