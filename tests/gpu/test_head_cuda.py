"""The head with cross-entropy on a GPU against fp64, by the rule of megavlm_kernels.testing.tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megavlm_kernels.linear_cross_entropy import linear_cross_entropy, op
from megavlm_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from megavlm_kernels.testing.tolerance import errors_against_truth

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("softcap", "z_loss"), [(None, 0.0), (None, 1e-3), (30.0, 1e-3)])
@pytest.mark.parametrize("by", ["triton", "torch"])
@pytest.mark.parametrize("chunk", [1 << 27, 70 * 33000])
def test_equals_fp64(
    chunk: int, by: str, softcap: float | None, z_loss: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    rows, width, vocabulary, padded = 200, 256, 32001, 32008
    made: list[Any] = [torch.randn(rows, width, generator=generator), torch.randn(padded, width, generator=generator) / 16]
    given = [x.to("cuda", dtype).requires_grad_() for x in made]
    target, loss_weight = torch.randint(0, vocabulary, (rows,), generator=generator), torch.rand(rows, generator=generator)
    monkeypatch.setattr(op, "CUDA_CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(op, "uses_triton", lambda x: by == "triton")
    options: dict[str, Any] = {"vocab_size": vocabulary, "softcap": softcap, "z_loss": z_loss}
    found = linear_cross_entropy(*given, target.cuda(), loss_weight.cuda(), **options)  # type: ignore[misc]
    got = [found.loss_Q.to(dtype), *torch.autograd.grad(found.total, given)]
    sides = []
    for kind, where in ((torch.float64, "cpu"), (dtype, "cuda")):
        x = [y.detach().to(where, kind).requires_grad_() for y in given]
        total, loss, _ = linear_cross_entropy_reference(*x, target.to(where), loss_weight.to(where), **options)  # type: ignore[misc]
        sides.append([loss, *torch.autograd.grad(total, x)])
    truth, eager = sides
    assert not errors_against_truth([x.cpu() for x in got], [x.cpu() for x in eager], truth, ["loss", "hidden", "weight"])


def test_sums_of_chunks_are_in_fp32() -> None:
    """The product that adds bf16 matrices to an fp32 sum is there on every GPU that trains in bf16 with this torch."""
    device = torch.device("cuda")
    total, a, b = torch.ones(64, 32, device=device), torch.randn(64, 48, device=device), torch.randn(48, 32, device=device)
    op._add_product(total, a.bfloat16(), b.bfloat16())
    exact = 1.0 + a.bfloat16().double() @ b.bfloat16().double()
    assert op._has_wide_product(torch.bfloat16, device)
    assert (total.double() - exact).abs().max() <= 1e-5 * exact.abs().max()
