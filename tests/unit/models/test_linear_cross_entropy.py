"""The head with cross-entropy against three lines of torch and autograd, in fp64; on one rank and with the vocabulary on two."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from megavlm.testing.pool import RankPool
from megavlm_kernels.linear_cross_entropy import linear_cross_entropy, op
from megavlm_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

ROWS, WIDTH, VOCABULARY, PADDED = 13, 6, 21, 24


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, WIDTH, generator=generator, dtype=dtype, requires_grad=True)
    weight = (2 * torch.randn(PADDED, WIDTH, generator=generator, dtype=dtype)).requires_grad_()
    target = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    return hidden, weight, target, torch.rand(ROWS, generator=generator, dtype=dtype)


def run(softcap: float | None, chunk: int, upstream: float = 0.3) -> Any:
    """(loss of each row, gradients) on this rank; with two ranks each has half the vocabulary."""
    hidden, weight, target, loss_weight = inputs()
    ranks = dist.get_world_size()
    own = PADDED // ranks
    start = own * dist.get_rank()
    part = weight.detach()[start : start + own].requires_grad_()
    group = dist.group.WORLD if ranks > 1 else None
    whole, op.CHUNK_ELEMENTS = op.CHUNK_ELEMENTS, chunk
    total, loss = linear_cross_entropy(
        hidden, part, target, loss_weight, vocab_size=VOCABULARY, vocab_start=start, group=group, softcap=softcap
    )
    op.CHUNK_ELEMENTS = whole
    (upstream * total).backward()
    if ranks > 1:
        dist.all_reduce(hidden.grad)
    return loss, hidden.grad, part.grad


@pytest.mark.parametrize("softcap", [None, 1.5, 30.0])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("chunk", [1 << 24, 3 * PADDED])
def test_losses_and_gradients(pool: RankPool, softcap: float | None, ranks: int, chunk: int) -> None:
    hidden, weight, target, loss_weight = inputs()
    total, want = linear_cross_entropy_reference(hidden, weight, target, loss_weight, VOCABULARY, softcap)
    (0.3 * total).backward()
    results = pool.run(run, softcap, chunk, world_size=ranks)
    for loss, hidden_grad, _ in results:
        assert torch.allclose(loss, want, rtol=0, atol=1e-12)
        assert torch.allclose(hidden_grad, hidden.grad, rtol=0, atol=1e-12)
    assert weight.grad is not None
    assert torch.allclose(torch.cat([grad for *_, grad in results]), weight.grad, rtol=0, atol=1e-12)


def test_the_reference_is_the_derivative() -> None:
    hidden, weight, target, loss_weight = inputs()
    assert torch.autograd.gradcheck(
        lambda h, w: linear_cross_entropy_reference(h, w, target, loss_weight, VOCABULARY, 1.5)[0], (hidden, weight)
    )
