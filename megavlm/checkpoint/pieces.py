"""What of a model and its optimizer this rank holds: boxes of tensors that have names of their own in every layout.

Tensors are named by global keys (`language.decoder.layers.3...`, `optimizer.exp_avg.language...`), with megatron-core's word on which box
of the whole a rank has. A rank that holds a stretch of a flattened parameter only (ZeRO) holds a few boxes of it. Values are not copied:
a piece is a view of the parameter, or of the optimizer's tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.utils import unwrap_model

from megavlm.checkpoint import optimizer_state
from megavlm.checkpoint.boxes import Box, cut
from megavlm.models.weights import sharding_metadata
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.sharded import compute_dtype, local_part, stand_ins

OPTIMIZER = "optimizer."
"""Begins the keys of optimizer state."""


class Piece(NamedTuple):
    """A box of a tensor, on this rank."""

    key: str
    dtype: torch.dtype
    """In the checkpoint; the tensor may have another one (fp32 parameters of ZeRO-3 that are computed with in bf16)."""
    shape: tuple[int, ...]
    """Of the whole tensor."""
    box: Box
    tensor: torch.Tensor
    """The values, shaped as the box."""
    is_padded: bool
    """The whole tensor's rows depend on the layout (vocabulary): those that a checkpoint lacks are zero."""
    is_copy: bool
    """Another group of ranks writes the same values, perhaps in other boxes."""


class Pieces(NamedTuple):
    """Of a rank."""

    model: list[Piece]
    optimizer: list[Piece]
    """Of what trains; later in a load, since a master may be the parameter itself."""

    def modules(self) -> set[str]:
        """Names of the top-level modules that this rank holds a part of."""
        return {piece.key.split(".", 1)[0] for piece in self.model}


def pieces_of(chunks: Sequence[torch.nn.Module], optimizer: Any | None, ctx: ParallelContext) -> Pieces:
    """Pieces of wrapped or bare chunks and of their optimizer; its states are created where Adam has none yet."""
    with stand_ins(chunks) as sharded:
        bases = _bases(chunks, ctx)
    model: list[Piece] = []
    by_parameter: dict[int, Any] = {}
    for at, base in bases.items():
        parameter = sharded.get(at)
        by_parameter[at if parameter is None else id(parameter)] = base
        if parameter is None:
            model += _whole(base)
        else:
            model += _stretch(base, *local_part(parameter, parameter), compute_dtype(parameter))
    states: list[Piece] = []
    for name, owner, tensor, start in [] if optimizer is None else optimizer_state.tensors(optimizer):
        base = by_parameter[id(owner)]
        key = f"{OPTIMIZER}{name}.{base.key}"
        if start is None:
            kind = {"dtype": tensor.dtype} if isinstance(base, ShardedTensor) else {}
            states += _whole(replace(base, key=key, data=tensor, **kind))
        else:
            states += _stretch(replace(base, key=key), tensor, start, tensor.dtype)
    return Pieces([p for p in model if p.box.numel], [p for p in states if p.box.numel])


def _bases(chunks: Sequence[torch.nn.Module], ctx: ParallelContext) -> dict[int, Any]:
    """Parameter id -> its sharded tensor (or factory of several). Objects (Transformer Engine's extra state) are left out."""
    bases: dict[int, Any] = {}
    for chunk in chunks:
        sharded = unwrap_model(chunk).sharded_state_dict(metadata=sharding_metadata(ctx))
        for base in nested_values(sharded):
            if isinstance(base, ShardedTensor | ShardedTensorFactory):
                bases[id(base.data)] = base
    return bases


def _built(base: Any) -> list[ShardedTensor]:
    """The sharded tensors of a base; a factory's are views of its data."""
    box = {"base": base}
    apply_factories(box)
    return [t for t in nested_values(box) if isinstance(t, ShardedTensor)]


def _whole(base: Any) -> list[Piece]:
    return [_piece(t, Box((0,) * t.data.dim(), tuple(t.data.shape)), t.data.detach(), t.dtype, is_copy=False) for t in _built(base)]


def _stretch(base: Any, local: torch.Tensor, start: int, dtype: torch.dtype) -> list[Piece]:
    """Boxes of the stretch of a flattened parameter that `local` is, from element `start` on."""
    shape = tuple(base.data.shape)
    kind = {"dtype": dtype} if isinstance(base, ShardedTensor) else {}
    base = replace(base, data=torch.empty(shape, dtype=dtype, device="meta"), **kind)
    # All of the base's replicas hold the same values, but not in the same boxes: their ranks' stretches may differ. The last number counts
    # the ranks that share the parameter's stretches.
    is_copy = isinstance(base.replica_id, tuple) and any(base.replica_id[:-1])
    found: list[Piece] = []
    for tensor in _built(base):
        view = tensor.data
        for strip in cut(tuple(view.shape), view.stride(), view.storage_offset(), start, start + local.numel()):
            strides = view.stride()
            values = local.as_strided(strip.box.sizes, strides, local.storage_offset() + strip.start - start)
            found.append(_piece(tensor, strip.box, values, dtype, is_copy))
    return found


def _piece(tensor: ShardedTensor, box: Box, values: torch.Tensor, dtype: torch.dtype, is_copy: bool) -> Piece:
    """`box` is in the tensor on this rank."""
    axes = tensor.prepend_axis_num
    inner = (0,) * axes + box.offset
    offset = tuple(o + n for o, n in zip(tensor.global_offset, inner, strict=True))
    sizes = (1,) * axes + box.sizes
    values = values[(None,) * axes] if axes else values
    return Piece(tensor.key, dtype, tuple(tensor.global_shape), Box(offset, sizes), values, tensor.allow_shape_mismatch, is_copy)
