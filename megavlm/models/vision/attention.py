"""Self-attention of vision encoders: what megatron-core's own has no switch for.

Shape legend: L rows, H heads of this tensor rank, K head width, D encoder width.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group, make_sharded_tensors_for_checkpoint

from megavlm.models.layers.norms import new
from megavlm_kernels.rms_norm import rms_norm

QK_NORM_EPS = 1e-6
"""Of InternViT's norms of query and key, whatever its other norms have (transformers 5.23, models/internvl)."""


class EncoderAttention(SelfAttention):
    """megatron-core's self-attention, whose query, key and value have a bias by `config.add_qkv_bias` alone."""

    def __init__(self, config: TransformerConfig, submodules: SelfAttentionSubmodules, *args: Any, **kwargs: Any) -> None:
        column: Any = submodules.linear_qkv

        def linear_qkv(*inner: Any, **options: Any) -> torch.nn.Module:
            # megatron-core gives one to all three wherever the output has one.
            built: torch.nn.Module = column(*inner, **(options | {"bias": config.add_qkv_bias}))
            return built

        super().__init__(config, replace(submodules, linear_qkv=linear_qkv), *args, **kwargs)


class PlainOutputAttention(EncoderAttention):
    """No bias on the output although the MLP has biases (Mllama)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        config = copy.copy(config)
        config.add_bias_linear = False
        super().__init__(config, *args, **kwargs)


class WideNormAttention(EncoderAttention):
    """Query and key pass an RMSNorm over all heads together (InternViT 6B, https://arxiv.org/abs/2312.14238)."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        # Not q_layernorm and k_layernorm: megatron-core sums gradients of these names over tensor ranks.
        self.query_norm, self.key_norm = (WideRMSNorm(config, self.pg_collection.tp) for _ in range(2))

    def get_query_key_value_tensors(self, *args: Any, **kwargs: Any) -> Any:
        # split_qkv=False would hand out the three in one, before the norms.
        query, key, value = super().get_query_key_value_tensors(*args, **(kwargs | {"split_qkv": True}))
        return self.query_norm(query), self.key_norm(key), value


class WideRMSNorm(torch.nn.Module):
    """RMSNorm over the heads of all tensor ranks; each rank holds its own heads' part of the weight."""

    def __init__(self, config: TransformerConfig, group: torch.distributed.ProcessGroup) -> None:
        super().__init__()
        self.group = group
        self.width, self.ranks = config.hidden_size, config.tensor_model_parallel_size
        self.weight = torch.nn.Parameter(torch.ones(self.width // self.ranks, **new(config)))
        # As megatron-core marks what is cut, so that the gradient norm counts every rank's part.
        self.weight.tensor_model_parallel, self.weight.partition_dim, self.weight.partition_stride = True, 0, 1  # type: ignore[attr-defined]

    def forward(self, x_LBHK: torch.Tensor) -> torch.Tensor:
        if self.ranks == 1:
            return rms_norm(x_LBHK.flatten(-2), self.weight, QK_NORM_EPS).view_as(x_LBHK)
        x = x_LBHK.flatten(-2).float()
        total = x.square().sum(-1, keepdim=True)
        # Summed over ranks forward, and backward too: every rank's heads depend on the one sum.
        total = reduce_from_tensor_model_parallel_region(copy_to_tensor_model_parallel_region(total, self.group), self.group)
        normed = (x * torch.rsqrt(total / self.width + QK_NORM_EPS)).to(x_LBHK.dtype)
        return (self.weight * normed).view_as(x_LBHK)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> ShardedStateDict:
        """One tensor of the encoder's width, cut by heads."""
        groups = {"tp_group": self.group, "dp_cp_group": ensure_metadata_has_dp_cp_group(metadata)["dp_cp_group"]}
        state: ShardedStateDict = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets, **groups
        )
        return state
