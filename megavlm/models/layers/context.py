"""One rank's part of a sequence that context ranks share, and the keys and values that its queries need from the others.

The split itself is arithmetic (topology/context.py). Here it becomes indices on the device, built once per microbatch.

Shape legend: S rows of the sequence, L rows of this rank with its pads, R without them, G key/value heads, K head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all

from megavlm.parallel.host import on_device
from megavlm.topology.context import ContextLayout
from megavlm_kernels.context_attention.op import ContextBounds


@dataclass
class KeyExchange:
    """Which rows every rank sends to every other so that each has the keys of its spans, and no others.

    One exchange carries keys and values together. What arrives is laid out span after span, so that the keys of attention's pieces lie
    side by side and kernels for unequal lengths need nothing else; keys that two spans of a segment see are there twice (with the split
    zigzag 1 / (2 x ranks) more rows than the sequence has).
    """

    send_rows: torch.Tensor
    """Rows of this rank that go out, by the rank that gets them."""
    send_counts: list[int]
    receive_counts: list[int]
    order: torch.Tensor
    """Of the rows as they arrive, by the rank they come from, those that stand at each place."""

    @classmethod
    def of(cls, layout: ContextLayout, rank: int, device: torch.device, whole: frozenset[int] | None = frozenset()) -> KeyExchange:
        """Of rank `rank`; `whole` as in `ContextLayout.keys`."""
        owner_S, place_S = torch.empty(layout.total, dtype=torch.int64), torch.empty(layout.total, dtype=torch.int64)
        for number, spans in enumerate(layout.spans):
            for span in spans:
                owner_S[span.row : span.row + span.length] = number
                place_S[span.row : span.row + span.length] = torch.arange(span.place, span.place + span.length)
        needed = [torch.zeros(layout.total, dtype=torch.bool) for _ in range(layout.size)]
        for number, seen_S in enumerate(needed):
            for first, count in layout.keys(number, whole):
                seen_S[first : first + count] = True
        # From every rank its rows arrive in the order of the sequence.
        sent = [torch.nonzero(seen_S & (owner_S == rank)).squeeze(1) for seen_S in needed]
        received = [torch.nonzero(needed[rank] & (owner_S == number)).squeeze(1) for number in range(layout.size)]
        arrives_S = torch.full((layout.total,), -1, dtype=torch.int64)
        arrived = torch.cat(received)
        arrives_S[arrived] = torch.arange(arrived.numel())
        seen = [arrives_S[first : first + count] for first, count in layout.keys(rank, whole)]
        return cls(
            send_rows=place_S[torch.cat(sent)].to(device),
            send_counts=[rows.numel() for rows in sent],
            receive_counts=[rows.numel() for rows in received],
            order=(torch.cat(seen) if seen else arrived).to(device),
        )

    def bring(self, key: torch.Tensor, value: torch.Tensor, group: dist.ProcessGroup) -> tuple[torch.Tensor, torch.Tensor]:
        """(L, G, K) each, of this rank -> keys and values that its spans see, in their order; gradients add up at the owners."""
        joined = torch.cat([key, value], dim=-1).index_select(0, self.send_rows)
        arrived: torch.Tensor = all_to_all(group, joined, self.receive_counts, self.send_counts)
        seen = arrived.index_select(0, self.order)
        return seen[..., : key.shape[-1]], seen[..., key.shape[-1] :]


@dataclass
class ContextPart:
    """One rank's part of a sequence."""

    layout: ContextLayout
    rank: int
    rows_L: torch.Tensor
    """Row of the sequence that each row of this rank holds. A pad repeats some row; nothing ever reads what becomes of it."""
    is_pad_L: torch.Tensor | None
    """bool; None: there are no pads."""
    places_R: torch.Tensor | None
    """Rows of this rank that are no pads, in order; None: all of them."""
    place_S: torch.Tensor
    """Row of this rank that holds each row of the sequence, -1 where another rank does."""
    exchange: KeyExchange
    bounds: ContextBounds
    """Of segments, as Transformer Engine wants them; with another split than zigzag nobody asks for them."""

    @classmethod
    def of(cls, layout: ContextLayout, rank: int, device: torch.device, whole: frozenset[int] | None = frozenset()) -> ContextPart:
        """What rank `rank` holds; `whole` as in `ContextLayout.keys`."""
        rows, places = torch.zeros(layout.num_rows, dtype=torch.int64), torch.full((layout.total,), -1, dtype=torch.int64)
        is_pad = torch.ones(layout.num_rows, dtype=torch.bool)
        for span in layout.spans[rank]:
            own = slice(span.place, span.place + span.length)
            rows[own] = torch.arange(span.row, span.row + span.length)
            is_pad[own] = False
            places[span.row : span.row + span.length] = torch.arange(span.place, span.place + span.length)
        has_pads = bool(is_pad.any())
        return cls(
            layout=layout,
            rank=rank,
            rows_L=rows.to(device),
            is_pad_L=is_pad.to(device) if has_pads else None,
            places_R=torch.nonzero(~is_pad).squeeze(1).to(device) if has_pads else None,
            place_S=places.to(device),
            exchange=KeyExchange.of(layout, rank, device, whole),
            bounds=_bounds(layout, device),
        )

    def without_pads(self, x_L: torch.Tensor) -> torch.Tensor:
        """Rows (R, ...) of (L, ...) that are no pads."""
        return x_L if self.places_R is None else x_L.index_select(0, self.places_R)

    def with_pads(self, x_R: torch.Tensor) -> torch.Tensor:
        """(L, ...) with zeros in the place of pads: the way back of `without_pads`."""
        if self.places_R is None:
            return x_R
        return x_R.new_zeros(self.layout.num_rows, *x_R.shape[1:]).index_copy(0, self.places_R, x_R)

    def local_targets(self, positions_Q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of this rank that are targets, and which of the targets, given by row of the sequence, these are."""
        places = self.place_S[positions_Q]
        mine = torch.nonzero(places >= 0).squeeze(1)
        return places[mine], mine


def _bounds(layout: ContextLayout, device: torch.device) -> ContextBounds:
    found = [(length, padded) for length, padded in zip(layout.lengths, layout.padded_lengths, strict=True) if padded]
    has_pads = any(length != padded for length, padded in found)
    plain = on_device([0, *accumulate(length for length, _ in found)], device, torch.int32)
    with_pads = on_device([0, *accumulate(padded for _, padded in found)], device, torch.int32)
    return ContextBounds(plain, with_pads if has_pads else plain, max((padded for _, padded in found), default=0))
