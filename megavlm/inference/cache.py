"""Keys and values of the tokens seen so far, for a batch of sequences of unequal length.

The prompts of a batch go through the model once, packed end to end as in training (block-diagonal attention, no padding).
From then on every sequence adds one token a step, and each layer makes one padded, masked attention call for the whole batch.

Shape legend: B sequences, S rows of this forward pass, H heads, G key/value heads (both of this tensor rank), K head dim,
W width of the cache (longest sequence it has room for).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from megavlm.models.layers.attention import attend_packed
from megavlm.models.layers.packing import Packing
from megavlm_kernels.packed_attention import capped_attention

GROWTH_TOKENS = 64
"""The cache grows in steps of this many tokens: answers are mostly far shorter than their limit."""


class KVCache:
    """Handed to the language model as `packing.cache`; one object serves all layers.

    Call `begin` before each forward pass and `drop` when sequences have ended.
    """

    def __init__(self) -> None:
        self.lengths: list[int] = []
        """Tokens that each sequence holds, those of the pass under way included."""
        self.pictures: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        """Layer -> keys and values of the features of all pictures, for layers that read them; computed once."""
        self.looks: list[Any] = []
        """Of each sequence: what its next token sees of them (models/language/cross.py)."""
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        self._decodes = False
        self._common: int | None = None
        self._rows_S: torch.Tensor | None = None
        self._age_BW: torch.Tensor | None = None
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def width(self) -> int:
        """W: room per sequence, in tokens."""
        longest = max(self.lengths, default=0)
        return -(-longest // GROWTH_TOKENS) * GROWTH_TOKENS

    def begin(self, new_lengths: Sequence[int], device: torch.device) -> None:
        """Announce a pass that adds new_lengths[b] tokens to sequence b: any number on the first pass, then one each."""
        is_prefill = not self.lengths
        if is_prefill:
            self.lengths = [0] * len(new_lengths)
        assert is_prefill or list(new_lengths) == [1] * len(self.lengths), "after the prompts, each sequence adds one token a pass"
        before, self.lengths = self.lengths, [a + b for a, b in zip(self.lengths, new_lengths, strict=True)]
        self._decodes, self._masks, self._age_BW = not is_prefill, {}, None
        # Sequences of one length need neither masks nor scattered writes.
        self._common = self.lengths[0] if min(self.lengths) == max(self.lengths) else None
        self._rows_S = None
        if self._common is not None:
            return
        width = self.width
        new = enumerate(zip(before, new_lengths, strict=True))
        rows = [b * width + p for b, (first, count) in new for p in range(first, first + count)]
        self._rows_S = torch.tensor(rows, device=device)
        if self._decodes:
            self._age_BW = torch.tensor(before, device=device)[:, None] - torch.arange(width, device=device)[None, :]

    def attend(
        self,
        layer_number: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        packing: Packing,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        backend: str = "auto",
    ) -> torch.Tensor:
        """Store this pass's keys and values and attend to all of the sequence: (S, H, K), (S, G, K), (S, G, K) -> (S, H, K).

        Rows that see each other both ways are those of the prompts (`packing.masks`): every later token sees what came before it.
        `backend` too is for the prompts.
        """
        keys, values = self._store(self._keys, layer_number, key), self._store(self._values, layer_number, value)
        if not self._decodes:
            return attend_packed(query, key, value, packing, causal=True, scale=scale, window=window, softcap=softcap, backend=backend)
        mask = None
        if self._common is not None:
            seen = slice(0 if window is None else max(self._common - window, 0), self._common)
            keys, values = keys[:, :, seen], values[:, :, seen]
        else:
            mask = self._mask(window, query.dtype) if softcap is None else self._visible(window)
        q = query.unsqueeze(2)
        if softcap is not None:
            return capped_attention(q, keys, values, mask, scale, softcap).squeeze(2)
        grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped).squeeze(2)

    def _visible(self, window: int | None) -> torch.Tensor:
        """(B, 1, 1, W): which of a sequence's places its new token sees."""
        assert self._age_BW is not None
        seen_BW = self._age_BW >= 0 if window is None else (self._age_BW >= 0) & (self._age_BW < window)
        return seen_BW[:, None, None, :]

    def _mask(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """The same to be added to scores, made once a pass: each layer would turn a boolean one into this."""
        if window not in self._masks:
            visible = self._visible(window)
            self._masks[window] = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
        return self._masks[window]

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only the sequences numbered `keep`, in that order; they are renumbered from 0."""
        self.lengths = [self.lengths[b] for b in keep]
        self.looks = [self.looks[b] for b in keep] if self.looks else []
        for store in (self._keys, self._values):
            for layer, cached in store.items():
                store[layer] = cached[torch.tensor(list(keep), dtype=torch.int64, device=cached.device)]

    def _store(self, store: dict[int, torch.Tensor], layer: int, new_SGK: torch.Tensor) -> torch.Tensor:
        """Write new rows into the layer's padded tensor and return it as (B, G, W, K)."""
        held, width = store.get(layer), self.width
        if held is None or held.shape[1] != width:
            # Zeros, not uninitialised memory: a masked NaN is still a NaN after the softmax's product.
            fitting = new_SGK.new_zeros(len(self.lengths), width, *new_SGK.shape[1:])
            if held is not None:
                # Dropping the longest sequence may leave more room than the others need.
                both = min(width, held.shape[1])
                fitting[:, :both] = held[:, :both]
            held = store[layer] = fitting
        if self._common is None:
            assert self._rows_S is not None
            held.view(-1, *new_SGK.shape[1:]).index_copy_(0, self._rows_S, new_SGK)
        else:
            count = new_SGK.shape[0] // len(self.lengths)
            held[:, self._common - count : self._common] = new_SGK.view(len(self.lengths), count, *new_SGK.shape[1:])
        return held.transpose(1, 2)
