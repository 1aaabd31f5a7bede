"""The forward passes of megatron-core's layers without what only training needs, while a model generates.

In megatron-core every matrix product passes through an autograd function that overlaps communication with the backward pass, and every
layer asks whether to recompute, offload, capture a graph or drop out. With one token a step that costs as much as the products of a small
model. Here the same weights go through torch's `linear`, tensor ranks through one all-reduce, and the layer is only its sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer

from megavlm.models.layers.attention import PackedAttention
from megavlm.models.layers.norms import RMSNorm
from megavlm.models.layers.packing import Packing

Output = tuple[torch.Tensor, torch.Tensor | None]


@contextmanager
def light_linears(model: torch.nn.Module) -> Iterator[None]:
    """Swap the forward of megatron-core's own layers (not Transformer Engine's, not subclasses that change it) and put it back."""
    swapped: list[torch.nn.Module] = []
    try:
        for module in model.modules():
            light = _light(module)
            if light is not None:
                module.forward = light
                swapped.append(module)
        yield
    finally:
        for module in swapped:
            del module.forward


def _light(module: Any) -> Callable[..., Any] | None:
    """Its light forward, where that is the same computation."""
    if "forward" in vars(module):  # its own already, while it trains
        return None
    forward = type(module).forward
    if forward is ColumnParallelLinear.forward and not (module.gather_output or module.sequence_parallel or module.explicit_expert_comm):
        return partial(_column, module) if module.weight is not None else None
    if forward is RowParallelLinear.forward and module.input_is_parallel and not (module.sequence_parallel or module.explicit_expert_comm):
        return partial(_row, module)
    if forward is Attention.forward and isinstance(module.core_attention, PackedAttention) and not module.config.attention_output_gate:
        return partial(_attention, module)
    if forward is TransformerLayer.forward and isinstance(module.cross_attention, IdentityOp) and _plain_residuals(module):
        return partial(_layer, module)
    if forward is RMSNorm.forward and not module.zero_centered and module.weight.device.type == "cpu":
        return partial(_rms_norm, module, torch.full((1,), module.eps))
    return None


def _plain_residuals(layer: Any) -> bool:
    return layer.self_attn_bda is get_bias_dropout_add and layer.mlp_bda is get_bias_dropout_add


def _column(module: Any, x: torch.Tensor) -> Output:
    if module.skip_bias_add:
        return F.linear(x, module.weight), module.bias
    return F.linear(x, module.weight, module.bias), None


def _row(module: Any, x: torch.Tensor) -> Output:
    out = F.linear(x, module.weight)
    if module.tp_group.size() > 1:
        dist.all_reduce(out, group=module.tp_group)
    if module.skip_bias_add or module.bias is None:
        return out, module.bias
    return out + module.bias, None


def _attention(module: Any, x: torch.Tensor, attention_mask: None = None, *, packed_seq_params: Packing, **_: Any) -> Output:
    query, key, value = (part.squeeze(1) for part in module.get_query_key_value_tensors(x, None))
    out: Output = module.linear_proj(module.core_attention(query, key, value, None, packed_seq_params=packed_seq_params).unsqueeze(1))
    return out


def _layer(
    module: Any, x: torch.Tensor, attention_mask: None = None, *, packed_seq_params: Packing, padding_mask: None = None
) -> tuple[torch.Tensor, None]:
    x = _add_residual(module.self_attention(module.input_layernorm(x), packed_seq_params=packed_seq_params), x)
    return _add_residual(module.mlp(module.pre_mlp_layernorm(x), padding_mask=padding_mask), x), None


def _add_residual(output_and_bias: Output, residual: torch.Tensor) -> torch.Tensor:
    x, bias = output_and_bias
    x = x if bias is None else x + bias
    return x + (residual if residual.dtype == x.dtype else residual.to(x.dtype))


def _rms_norm(module: RMSNorm, eps: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """From torch's vector norm: for a few rows on a CPU that takes half the time of `F.rms_norm`."""
    if x.dtype != torch.float32 or module.weight.dtype != torch.float32:
        return RMSNorm.forward(module, x)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * torch.addcmul(eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_() * module.weight
