"""Transformer Engine's attention over context ranks: a ring (p2p), all-gather or all-to-all, chosen by selection.py.

Every segment is padded to a multiple of 2 x ranks and cut into as many chunks; a rank holds chunk r and its mirror image of each, in the
order of the segments ("dual chunk swap", Transformer Engine, attention/dot_product_attention/context_parallel.py). Bounds of segments are
those of the whole sequence, with and without pads; what kernels leave in the rows of pads is undefined, so it is kept out here, forward
and backward.

Shape legend: L rows of this rank, with pads; B segments; H heads, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ContextBounds:
    """Segments of the whole sequence, none of them empty; the same on every context rank."""

    cu_seqlens: torch.Tensor
    """int32 (B + 1,): cumulated lengths."""
    cu_seqlens_padded: torch.Tensor
    """int32 (B + 1,): cumulated lengths with pads, each a multiple of 2 x ranks. The very object `cu_seqlens` where there are no pads on
    any rank: by that Transformer Engine knows."""
    longest: int
    """Rows of the longest segment with its pads."""

    @property
    def has_pads(self) -> bool:
        """On some rank."""
        return self.cu_seqlens_padded is not self.cu_seqlens


class ContextAttention:
    """The attention of one layer; without weights, and no torch module, so that nothing of it gets into checkpoints."""

    def __init__(
        self, heads: int, key_heads: int, width: int, *, scale: float, window: int | None, comm: str, group: dist.ProcessGroup
    ) -> None:
        self.comm, self.group = comm, group
        self.window = (-1 if window is None else window - 1, 0)
        self.sizes = {"num_attention_heads": heads, "num_gqa_groups": key_heads, "kv_channels": width, "softmax_scale": scale}
        self._module: Any = None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bounds: ContextBounds, is_pad_L: torch.Tensor | None
    ) -> torch.Tensor:
        """(L, H, K), (L, G, K), (L, G, K) -> (L, H, K), zeros in the rows of pads; causal within each segment."""
        if is_pad_L is not None:
            query, key, value = (x.masked_fill(is_pad_L[:, None, None], 0.0) for x in (query, key, value))
        out: torch.Tensor = self._attention()(
            query.contiguous(),
            key.contiguous(),
            value.contiguous(),
            qkv_format="thd",
            cu_seqlens_q=bounds.cu_seqlens,
            cu_seqlens_kv=bounds.cu_seqlens,
            cu_seqlens_q_padded=bounds.cu_seqlens_padded,
            cu_seqlens_kv_padded=bounds.cu_seqlens_padded,
            max_seqlen_q=bounds.longest,
            max_seqlen_kv=bounds.longest,
            attn_mask_type="padding_causal",
            window_size=self.window,
            pad_between_seqs=bounds.has_pads,
        )
        out = out.view(query.shape)
        return out if is_pad_L is None else out.masked_fill(is_pad_L[:, None, None], 0.0)

    def _attention(self) -> Any:
        """Made when first needed: the process groups must be there, and torch's wish for determinism known."""
        if self._module is None:
            from transformer_engine.pytorch import DotProductAttention

            self._module = DotProductAttention(
                **self.sizes,
                attention_dropout=0.0,
                qkv_format="thd",
                attn_mask_type="padding_causal",
                cp_group=self.group,
                cp_global_ranks=dist.get_process_group_ranks(self.group),
                cp_stream=_stream(),
                cp_comm_type=self.comm,
            )
        return self._module


_streams: dict[int, Any] = {}


def _stream() -> Any:
    """One stream of this process for all layers: the second half of a ring's steps runs on it. None where there is no CUDA."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device()
    if device not in _streams:
        _streams[device] = torch.cuda.Stream()
    return _streams[device]
