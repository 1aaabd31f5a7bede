"""Write full tensors into a model of any layout, by megatron-core's own sharding metadata.

Every parameter's `ShardedTensor` says which slice of which global tensor this rank holds. Initialisation and import from
Hugging Face both go this way, so a weight is the same number in every layout, and a rank touches only what it owns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from megavlm.parallel.context import ParallelContext

Where = tuple[slice, ...]
"""A slice of a global tensor: a start and a stop for each dimension."""
Provider = Callable[[str, tuple[int, ...], Where], torch.Tensor]
"""(checkpoint key, global shape, this rank's slice) -> that slice; vocabulary rows may be fewer than asked for, padding being zero."""


def sharding_metadata(ctx: ParallelContext) -> dict[str, Any]:
    """How this project writes checkpoints; the same for model, optimizer, save and load.

    `non_homogeneous_layers` gives each layer its own key: a stack of layers of which some are frozen cannot be stored as
    one tensor. `fully_reshardable` lets the distributed optimizer's state load into any layout.
    """
    return {
        "dp_cp_group": ctx.data_context_group,
        "non_homogeneous_layers": True,
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def sharded_tensors(chunks: Sequence[torch.nn.Module], ctx: ParallelContext) -> Iterator[ShardedTensor]:
    """Every tensor of the model on this rank, with its place in the global tensor; its data are the parameter's own storage."""
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata=sharding_metadata(ctx))  # type: ignore[operator]
        apply_factories(state)
        yield from (v for v in nested_values(state) if isinstance(v, ShardedTensor))


@torch.no_grad()
def assign(chunks: Sequence[torch.nn.Module], provider: Provider, ctx: ParallelContext) -> int:
    """Fill every parameter from `provider`; returns the number of tensors written.

    Raises ValueError when a provided tensor has another shape than the model expects (vocabulary padding aside, which is zero).
    """
    count = 0
    for tensor in sharded_tensors(chunks, ctx):
        assert tensor.prepend_axis_num == 0, f"{tensor.key}: layers are stored one by one"
        where = tuple(slice(o, o + n) for o, n in zip(tensor.global_offset, tensor.local_shape, strict=True))
        own = provider(tensor.key, tuple(tensor.global_shape), where)
        if tuple(own.shape) != tuple(tensor.local_shape):
            own = _pad_rows(own, tuple(tensor.local_shape), tensor.key)
        tensor.data.copy_(own)
        count += 1
    return count


def is_vocabulary(key: str) -> bool:
    """Is it a tensor whose rows are padded for tensor parallelism?"""
    return "word_embeddings" in key or "output_layer" in key


def _pad_rows(own: torch.Tensor, shape: tuple[int, ...], key: str) -> torch.Tensor:
    if not is_vocabulary(key) or own.shape[1:] != shape[1:] or own.shape[0] > shape[0]:
        raise ValueError(f"{key}: the weights have shape {tuple(own.shape)}, the model expects {shape}: check the recipe's model block")
    return torch.cat([own, own.new_zeros(shape[0] - own.shape[0], *shape[1:])])
