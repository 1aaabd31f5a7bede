"""Layers without what only training needs, while a model generates.

megatron-core's layers pass every product through autograd functions that overlap the gradients' communication. For one token a step that
costs as much as the product of a small model. Here the same weights go through torch's `linear`, and tensor ranks through one all-reduce.
Dropout, which does nothing outside training, is left out of the residual sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.transformer_layer import TransformerLayer

Output = tuple[torch.Tensor, torch.Tensor | None]


@contextmanager
def light_linears(model: torch.nn.Module) -> Iterator[None]:
    """Swap the forward of megatron-core's own linear layers (not Transformer Engine's, not subclasses that change it) and put it back.

    So are the sums behind a layer's attention and MLP.
    """
    swapped: list[torch.nn.Module] = []
    sums: list[tuple[torch.nn.Module, str]] = []
    try:
        for module in model.modules():
            light = _light(module)
            if light is not None:
                module.forward = light  # type: ignore[method-assign,assignment]
                swapped.append(module)
            if isinstance(module, TransformerLayer):
                for name in ("self_attn_bda", "mlp_bda"):
                    if getattr(module, name) is get_bias_dropout_add:
                        setattr(module, name, _light_sum)
                        sums.append((module, name))
        yield
    finally:
        for module in swapped:
            del module.forward
        for module, name in sums:
            setattr(module, name, get_bias_dropout_add)


def _light(module: torch.nn.Module) -> Callable[..., Output] | None:
    """Its light forward, where that is the same computation."""
    forward = type(module).forward
    if forward is ColumnParallelLinear.forward and not (module.gather_output or module.sequence_parallel or module.explicit_expert_comm):
        return partial(_column, module) if module.weight is not None else None
    if forward is RowParallelLinear.forward and module.input_is_parallel and not (module.sequence_parallel or module.explicit_expert_comm):
        return partial(_row, module)
    return None


def _column(module: torch.nn.Module, x: torch.Tensor) -> Output:
    if module.skip_bias_add:
        return F.linear(x, module.weight), module.bias  # type: ignore[arg-type,return-value]
    return F.linear(x, module.weight, module.bias), None  # type: ignore[arg-type]


def _row(module: torch.nn.Module, x: torch.Tensor) -> Output:
    out = F.linear(x, module.weight)  # type: ignore[arg-type]
    if module.tp_group.size() > 1:  # type: ignore[union-attr,operator]
        dist.all_reduce(out, group=module.tp_group)  # type: ignore[arg-type]
    if module.skip_bias_add or module.bias is None:
        return out, module.bias  # type: ignore[return-value]
    return out + module.bias, None  # type: ignore[operator]


def _light_sum(training: bool, fused: bool) -> Callable[[Output, torch.Tensor, float], torch.Tensor]:
    assert not training, "for evaluation"
    return _sum


def _sum(x_with_bias: Output, residual: torch.Tensor, dropout: float) -> torch.Tensor:
    x, bias = x_with_bias
    x = x if bias is None else x + bias
    return x + residual.to(x.dtype)
