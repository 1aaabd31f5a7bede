"""Mixture of experts: megatron-core's router and token exchange, its sequential experts, the same on GPUs and on a CPU.

Every rank of the expert group holds some experts whole (or, with tensor parallelism, its columns of them) and sends each token to the
ranks of its experts. No token is dropped, so what a token gets depends on no other token: not on its pack, not on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.spec_utils import ModuleSpec

from megavlm.models.layers.activations import GatedActivation
from megavlm.models.layers.context import ContextPart
from megavlm.parallel.host import numbers_of_rows, on_device

_SPLITS = ("input_splits", "output_splits", "output_splits_tp")


class Experts(SequentialMLP):
    """The experts of this rank, one after another. Checkpoint keys name each by its number over all ranks: `experts.5.linear_fc1`."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        state: dict[str, Any] = {}
        first = self.ep_group.rank() * self.num_local_experts
        for index, expert in enumerate(self.local_experts):
            own_prefix = f"{prefix}local_experts.{index}."
            own = expert.sharded_state_dict(own_prefix, sharded_offsets, metadata)
            replace_prefix_for_sharding(own, own_prefix, f"{prefix}{first + index}.")
            for tensor in own.values():
                # Copies are those of the ranks that hold the same experts, not of all data-parallel ranks.
                tensor.replica_id = (*tensor.replica_id[:2], self.dp_group.rank())
            state |= own
        return state


@dataclass(frozen=True)
class Balance:
    """What the balancing loss must know of a microbatch."""

    is_padding_L: torch.Tensor
    """Rows of this context rank that belong to no sample."""
    num_targets: torch.Tensor
    """Gradients are divided by the targets of the whole step: a microbatch's balancing loss weighs as much as its own."""


def balance_of(lengths: Sequence[int], is_sample: Sequence[bool], weights_Q: torch.Tensor, part: ContextPart | None) -> Balance:
    """From the segments of a pack, which of them are samples, its targets' weights, and this context rank's part of it."""
    device = weights_Q.device
    padding_S = on_device([not it for it in is_sample], device, torch.bool)[numbers_of_rows(lengths, device)]
    num_targets = (weights_Q > 0).sum()
    if part is None:
        return Balance(padding_S, num_targets)
    padding_L = padding_S[part.rows_L]
    return Balance(padding_L if part.is_pad_L is None else padding_L | part.is_pad_L, num_targets)


class Router(TopKRouter):
    """megatron-core's router, with a product of tokens and weight that needs no Transformer Engine, and a balancing loss that is the
    same in every layout (megatron-core's is divided by the tensor and context ranks where losses are summed over tokens)."""

    balance: Balance | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not self.config.use_cpu_initialization:  # megatron-core makes it on the CPU and moves it in the first pass
            self.weight.data = self.weight.data.to(torch.cuda.current_device())

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, self.weight)

    def _apply_aux_loss(
        self, probs: torch.Tensor, scores_for_aux_loss: torch.Tensor, routing_map: torch.Tensor, with_padding_mask: bool = False
    ) -> torch.Tensor:
        """Switch Transformer's equations 4 to 6 over the whole microbatch, divided by top_k as megatron-core does."""
        if not self.weight.requires_grad:
            return probs  # a frozen router is not to be balanced by what lies below it
        assert self.balance is not None, "experts are balanced in a pass without its Balance"
        tokens_E = routing_map.sum(0).to(scores_for_aux_loss.dtype)
        dist.all_reduce(tokens_E, group=self.tp_cp_group)
        routed = tokens_E.sum().clamp(min=1.0)  # top_k for each token
        # This rank's part; the parts of all tensor and context ranks add up to the loss.
        loss = self.config.moe_aux_loss_coeff * self.num_experts * self.topk * (scores_for_aux_loss.sum(0) * tokens_E).sum() / routed**2
        if MoEAuxLossAutoScaler.main_loss_backward_scale is None:  # in the shape that megatron-core's schedules copy theirs into
            MoEAuxLossAutoScaler.main_loss_backward_scale = torch.ones(1, device=loss.device)
        attached: torch.Tensor = MoEAuxLossAutoScaler.apply(probs, loss * self.balance.num_targets)
        return attached


class MixtureOfExperts(MoELayer):
    """megatron-core's layer; on a CPU the token counts stay where they are instead of being copied beside a CUDA stream."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not torch.cuda.is_available():
            self.token_dispatcher.__class__ = _HostDispatcher

    def forward(self, hidden_states: torch.Tensor, intermediate_tensors: Any = None, padding_mask: Any = None) -> Any:
        """`padding_mask` is a `Balance` or None: the one argument that megatron-core's layer hands on to its experts."""
        del intermediate_tensors
        mask = None
        self.router.balance = padding_mask
        if padding_mask is not None:
            mask = padding_mask.is_padding_L
            if self.config.sequence_parallel:
                mask = mask.chunk(self.attn_tp_group.size())[self.attn_tp_group.rank()]
            mask = mask[None]
        try:
            return super().forward(hidden_states, None, mask)
        finally:  # recomputation ends a pass early, by an exception
            # Their graph ends in the weights, whose hooks hold the model: kept here it would be a circle that nothing collects, with
            # all the model's process groups and, on gloo, their threads.
            self.token_dispatcher.probs = None


class _HostDispatcher(MoEAlltoAllTokenDispatcher):
    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: torch.Tensor | None = None) -> torch.Tensor | None:
        if point == self.cuda_dtoh_point:
            for name in _SPLITS:
                counts = getattr(self, name)
                if torch.is_tensor(counts):
                    setattr(self, name, counts.numpy())
        return tokens_per_expert


def experts_spec() -> ModuleSpec:
    """For `LayerStyle.mlp`; sizes are in the TransformerConfig."""
    experts = ModuleSpec(module=Experts, submodules=MLPSubmodules(ColumnParallelLinear, GatedActivation, RowParallelLinear))
    return ModuleSpec(module=MixtureOfExperts, submodules=MoESubmodules(experts=experts, router=Router))
