"""Attention on a GPU in bf16, by whichever kernel it takes, against the masked formula in fp32 on the same numbers."""

from __future__ import annotations

import pytest
import torch

from megavlm.models.layers.attention import attend_packed
from megavlm.models.layers.masks import Bidirectional, groups_of
from megavlm.models.layers.packing import pack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
LENGTHS = [70, 3, 129, 54]


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 16, 100])
@pytest.mark.parametrize("kind", ["none", "prefix", "pictures"])
def test_windows_groups_and_soft_caps(kind: Bidirectional, window: int | None, softcap: float | None) -> None:
    device, rows = torch.device("cuda"), sum(LENGTHS)
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(rows, heads, 64, generator=generator).to(device, torch.bfloat16).requires_grad_() for heads in (4, 2, 2)]
    targets, pictures = torch.tensor([40, 72, 150, 240]).to(device), torch.cat([torch.arange(5, 30), torch.arange(80, 120)]).to(device)
    groups = groups_of(kind, LENGTHS, [True] * len(LENGTHS), targets, torch.tensor([0, 1, 2, 3]).to(device), pictures)
    packing = pack(LENGTHS, device, causal=True, groups=groups)
    got = attend_packed(*inputs, packing, causal=True, scale=0.125, window=window, softcap=softcap)
    visible = torch.zeros(rows, rows, dtype=torch.bool, device=device)
    assert packing.masks is not None
    for piece in packing.pieces:
        own = slice(piece.query_row, piece.query_row + piece.query_length)
        visible[own, piece.key_start : piece.key_start + piece.key_length] = packing.masks.mask(piece, window)
    query, key, value = inputs[0].float(), *(x.float().repeat_interleave(2, 1) for x in inputs[1:])
    scores = torch.einsum("qhk,shk->hqs", query, key) * 0.125
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    want = torch.einsum("hqs,shk->qhk", scores.masked_fill(~visible, float("-inf")).softmax(-1), value)
    assert torch.allclose(got.float(), want, atol=3e-2, rtol=3e-2)
    upstream = torch.randn(got.shape, generator=generator).to(device)
    ours, theirs = torch.autograd.grad(got, inputs, upstream.to(got.dtype)), torch.autograd.grad(want, inputs, upstream)
    for a, b in zip(ours, theirs, strict=True):
        # A window of one leaves queries without a gradient.
        assert float((a - b).float().norm()) <= 2e-2 * float(b.float().norm()) + 1e-1
