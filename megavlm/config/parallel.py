"""The `parallel` block: how the model, its layers and its batches are spread over ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from megavlm.config.blocks import Block, PositiveInt


class ParallelConfig(Block):
    """Shape of the rank grid; data parallelism takes what is left."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    context: PositiveInt = 1
    """Ranks that share each sequence."""
    expert: PositiveInt = 1
    """Ranks that share the experts of a mixture-of-experts layer, each whole on one of them: neighbours on the tensor, context and data
    axes, which add no ranks. With 1 every rank holds all experts, and tensor parallelism splits each."""
    sequence: bool = False
    """Megatron sequence parallelism: activations outside attention and MLP are split over the tensor ranks."""
    distributed_optimizer: bool = False
    """ZeRO-1: optimizer state is split over data-parallel ranks."""
    overlap_grad_reduce: bool = False
    """Overlap gradient reduction with the backward pass."""
    overlap_param_gather: bool = False
    """Overlap the distributed optimizer's parameter gather with the forward pass."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in LLM and encoder: attention only, or whole layers."""

    @model_validator(mode="after")
    def _check(self) -> ParallelConfig:
        if self.sequence and self.tensor == 1:
            raise ValueError("sequence=true needs tensor > 1: there is no tensor group to split over")
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError("virtual_pipeline > 1 needs pipeline > 1")
        if self.overlap_param_gather and not (self.distributed_optimizer and self.overlap_grad_reduce):
            raise ValueError("overlap_param_gather needs distributed_optimizer=true and overlap_grad_reduce=true")
        return self
