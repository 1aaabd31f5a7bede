"""A hash of a tensor's bits, computed where the tensor lies."""

from __future__ import annotations

import torch

CHUNK_ELEMENTS = 1 << 22
"""Hashed at a time: what bounds the memory for it (two tensors of eight bytes an element)."""
# Odd numbers of 64 bits, as signed ones: multiplying by them loses nothing. Knuth's golden ratio, and the two of splitmix64
# (https://prng.di.unimi.it/splitmix64.c).
_PLACE, _MIX_1, _MIX_2 = (n - (1 << 64) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_LOW_HALF = 0xFFFFFFFF


@torch.no_grad()
def content_hash(tensor: torch.Tensor) -> torch.Tensor:
    """64 bits, as one int64 on the tensor's device, of its values in their order; no shape, no format.

    Each element's bits and place are mixed into 64 bits without loss, and these are summed modulo 2^64: the order of the sum does not
    matter, so any device gives the same number. One element that differs always changes it; several do but for one case in 2^64.
    """
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    flat = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
    for first in range(0, flat.numel(), CHUNK_ELEMENTS):
        bits = flat[first : first + CHUNK_ELEMENTS]
        place = torch.arange(first, first + bits.numel(), dtype=torch.int64, device=tensor.device)
        mixed = place.mul_(_PLACE).add_(bits)
        for factor in (_MIX_1, _MIX_2):
            mixed.bitwise_xor_((mixed >> 32).bitwise_and_(_LOW_HALF)).mul_(factor)
        total += mixed.bitwise_xor_((mixed >> 32).bitwise_and_(_LOW_HALF)).sum()
    return total
