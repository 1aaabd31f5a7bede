"""Block-diagonal attention over packed sequences, as the core attention of megatron-core's layers.

Rotary positions are applied here, from tables that `Packing` computed once per microbatch, and not by megatron-core's
SelfAttention: its packed path ignores position ids and loops over segments in every layer.

What computes it is `megavlm_kernels.packed_attention`: a scaled-dot-product call per segment (any device; equal segments become one
batched call), or a kernel for packed sequences on CUDA. Segments that need more than causal order, and soft-capped scores, get a mask
of their own (`masks.py`). Transformer Engine's layers, where they are used, get this same core attention.

Shape legend: L local rows, S all rows, H heads, G key/value heads, K head dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

from megavlm.models.layers.context import ContextPart
from megavlm.models.layers.packing import Packing, apply_rotary
from megavlm_kernels.context_attention import SharedCall, choose_comm
from megavlm_kernels.context_attention.op import ContextAttention
from megavlm_kernels.packed_attention import Call, Segments, choose, machine_of, packed_attention
from megavlm_kernels.packed_attention.machine import DTYPE_NAMES

CAUSAL = (AttnMaskType.causal, AttnMaskType.padding_causal)


@dataclass(frozen=True)
class AttentionStyle:
    """What tells one family's attention from another's; one object for all layers of a model."""

    scale: float | None = None
    """None: 1 / sqrt(head width)."""
    softcap: float | None = None
    window_tokens: int | None = None
    """Sliding window (itself included) of the layers `window_layers`."""
    window_layers: frozenset[int] = frozenset()
    """Numbers from 1, over all pipeline stages."""
    masked: bool = False
    """In some packs rows see each other both ways."""
    rotary_by_window: bool = False
    """Layers with a window use the rotary table "local" instead of "global"."""

    def window_of(self, layer_number: int) -> int | None:
        return self.window_tokens if layer_number in self.window_layers else None

    def rotary_of(self, layer_number: int) -> str:
        return "local" if self.rotary_by_window and layer_number in self.window_layers else "global"


class PackedAttention(MegatronModule):
    """Core attention for `packed_seq_params` of type `Packing`; nothing else reaches it in this project."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
        style: AttentionStyle | None = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        style = style or AttentionStyle()
        self.window, self.softcap, self.rotary = style.window_of(layer_number), style.softcap, style.rotary_of(layer_number)
        self.is_causal = attn_mask_type in CAUSAL
        self.scale = style.scale or softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.backend = backend_of(config)
        self._check_backend(config, masked=style.masked)
        # A norm on queries or keys keeps them anyway.
        self.normed_heads = config.qk_layernorm
        self.context_group = pg_collection.cp if pg_collection is not None and config.context_parallel_size > 1 else None
        self.ring = None if self.context_group is None else ring_of(self, config, style, self.context_group)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Packing | None = None,
    ) -> torch.Tensor:
        """(L, H, K), (L, G, K), (L, G, K) -> (L, H x K)."""
        packing = packed_seq_params
        assert isinstance(packing, Packing), "every forward pass here is packed: build a Packing with megavlm.models.layers.packing.pack"
        if self.rotary in packing.rotary:
            cos_LK, sin_LK = packing.rotary[self.rotary]
            if packing.cache is not None and query.dtype == key.dtype:
                # One turn for both: with a row a sequence the number of operations is what costs.
                turned = apply_rotary(torch.cat([query, key], dim=1), cos_LK, sin_LK)
                query, key = turned.split([query.shape[1], key.shape[1]], dim=1)
            else:
                query, key = (apply_rotary(x, cos_LK, sin_LK) for x in (query, key))
                if value.requires_grad and packing.context is None and not self.normed_heads:
                    # A view of what queries, keys and values were computed into keeps all of it until the backward pass, and the
                    # rotated ones are new.
                    value = value.contiguous()
        options: dict[str, Any] = {"window": self.window, "softcap": self.softcap, "backend": self.backend}
        if packing.cache is not None:
            out = packing.cache.attend(self.layer_number, query, key, value, packing, self.scale, **options)
            return out.reshape(query.shape[0], -1)
        if packing.context is not None:
            return self._attend_shared(query, key, value, packing, packing.context, options)
        out = attend_packed(query, key, value, packing, causal=self.is_causal, scale=self.scale, **options)
        return out.reshape(query.shape[0], -1)

    def _attend_shared(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, part: ContextPart, options: dict[str, Any]
    ) -> torch.Tensor:
        """Attention of this context rank's rows to those of all."""
        assert self.context_group is not None, "a pack that context ranks share needs a config with their number"
        if self.ring is not None:
            return self.ring(query, key, value, part.bounds, part.is_pad_L).reshape(query.shape[0], -1)
        key, value = part.exchange.bring(key, value, self.context_group)
        query = part.without_pads(query)
        if packing.pieces:
            out = attend_packed(query, key, value, packing, causal=self.is_causal, scale=self.scale, **options)
        else:
            # This rank has pads only, but the others wait for its part in the backward pass.
            out = 0.0 * query + 0.0 * (key.sum() + value.sum())
        out = part.with_pads(out)
        return out.reshape(out.shape[0], -1)

    def _check_backend(self, config: TransformerConfig, *, masked: bool) -> None:
        """A backend that was asked for and cannot serve this layer here is refused when the model is built."""
        device = "cpu" if config.use_cpu_initialization else "cuda"
        call = Call(DTYPE_NAMES[config.params_dtype], config.kv_channels, self.window is not None, self.softcap is not None, masked)
        choose(call, machine_of(device), self.backend)


def ring_of(layer: PackedAttention, config: TransformerConfig, style: AttentionStyle, group: dist.ProcessGroup) -> ContextAttention | None:
    """Transformer Engine's way of parallel.context_comm for a layer; None: keys are brought, and precision.attention's kernel follows.

    Raises CommError where the way that was asked for cannot be.
    """
    tensor = config.tensor_model_parallel_size
    heads, key_heads = config.num_attention_heads // tensor, max(1, config.num_query_groups // tensor)  # fewer than ranks: copies
    call = Call(DTYPE_NAMES[config.params_dtype], config.kv_channels, layer.window is not None, layer.softcap is not None, style.masked)
    shared = SharedCall(call, config.context_parallel_size, heads, key_heads, getattr(config, "context_split", "pack"))
    machine = machine_of("cpu" if config.use_cpu_initialization else "cuda")
    comm = choose_comm(shared, machine, getattr(config, "context_comm", "auto"), layer.backend).comm
    if comm == "keys":
        return None
    return ContextAttention(heads, key_heads, config.kv_channels, scale=layer.scale, window=layer.window, comm=comm, group=group)


def backend_of(config: TransformerConfig) -> str:
    """precision.attention, which the configurations of layers/configs.py carry."""
    backend: str = getattr(config, "packed_attention", "auto")
    return backend


def attend_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packing: Packing,
    *,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention inside each segment: (L, H, K), (S, G, K), (S, G, K) -> (L, H, K).

    `window` (tokens that a row sees, itself included) and the groups of `packing.masks` are for causal attention.
    """
    segments = _segments(packing, key.shape[0])
    return packed_attention(query, key, value, segments, causal=causal, scale=scale, window=window, softcap=softcap, backend=backend)


def _segments(packing: Packing, key_rows: int) -> Segments:
    """The pieces of a packing as the kernels take them, put together once for all layers."""
    found = packing.segments
    if found is None:
        pieces, masks = packing.pieces, packing.masks
        queries, keys, starts = (tuple(getattr(piece, name) for piece in pieces) for name in ("query_length", "key_length", "key_start"))
        side_by_side = starts == tuple(accumulate(keys, initial=0))[:-1] and sum(keys) == key_rows
        found = packing.segments = Segments(
            queries,
            keys,
            None if side_by_side else starts,
            frozenset(number for number, piece in enumerate(pieces) if piece.grouped),
            None if masks is None else lambda number, window: masks.mask(pieces[number], window),
        )
    return found
