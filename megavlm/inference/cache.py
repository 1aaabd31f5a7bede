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

from megavlm.models.layers.attention import attend_packed, capped_attention
from megavlm.models.layers.packing import Packing

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
        self._sequence_S = self._position_S = torch.empty(0, dtype=torch.int64)
        self._visible_BW: torch.Tensor | None = None
        self._age_BW = torch.empty(0, 0, dtype=torch.int64)

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
        start = torch.tensor(self.lengths, device=device)
        count = torch.tensor(list(new_lengths), device=device)
        self.lengths = [a + b for a, b in zip(self.lengths, new_lengths, strict=True)]
        self._sequence_S = torch.repeat_interleave(torch.arange(len(count), device=device), count)
        first_row = torch.cumsum(count, 0) - count
        self._position_S = torch.arange(int(count.sum()), device=device) - (first_row - start)[self._sequence_S]
        self._visible_BW = None
        if not is_prefill:
            self._age_BW = start[:, None] - torch.arange(self.width, device=device)[None, :]
            self._visible_BW = self._age_BW >= 0

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
    ) -> torch.Tensor:
        """Store this pass's keys and values and attend to all of the sequence: (S, H, K), (S, G, K), (S, G, K) -> (S, H, K).

        Rows that see each other both ways are those of the prompts (`packing.masks`): every later token sees what came before it.
        """
        keys, values = self._store(self._keys, layer_number, key), self._store(self._values, layer_number, value)
        if self._visible_BW is None:
            return attend_packed(query, key, value, packing, causal=True, scale=scale, window=window, softcap=softcap)
        visible_BW = self._visible_BW if window is None else self._visible_BW & (self._age_BW < window)
        grouped, mask = query.shape[1] != key.shape[1], visible_BW[:, None, None, :]
        q = query.unsqueeze(2)
        if softcap is not None:
            return capped_attention(q, keys, values, mask, scale, softcap).squeeze(2)
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped).squeeze(2)

    def drop(self, keep: Sequence[int]) -> None:
        """Keep only the sequences numbered `keep`, in that order; they are renumbered from 0."""
        self.lengths = [self.lengths[b] for b in keep]
        self.looks = [self.looks[b] for b in keep] if self.looks else []
        for store in (self._keys, self._values):
            for layer, cached in store.items():
                store[layer] = cached[torch.tensor(list(keep), dtype=torch.int64, device=cached.device)]

    def _store(self, store: dict[int, torch.Tensor], layer: int, new_SGK: torch.Tensor) -> torch.Tensor:
        """Write new rows into the layer's padded tensor (B, G, W, K) and return it."""
        cached = store.get(layer)
        room = 0 if cached is None else cached.shape[2]
        if cached is None or room < self.width:
            # Zeros, not uninitialised memory: a masked NaN is still a NaN after the softmax's product.
            grown = new_SGK.new_zeros(len(self.lengths), new_SGK.shape[1], self.width, new_SGK.shape[2])
            if cached is not None:
                grown[:, :, :room] = cached
            cached = store[layer] = grown
        cached[self._sequence_S, :, self._position_S] = new_SGK
        # Dropping the longest sequence may leave more room than the others need.
        return cached[:, :, : self.width]
