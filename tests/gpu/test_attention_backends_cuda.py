"""Every attention backend of this GPU against fp64 on the CPU, by the rule of megavlm_kernels.testing.tolerance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megavlm_kernels.packed_attention import BACKENDS, BackendError, Segments, call_of, choose, machine_of, packed_attention
from megavlm_kernels.packed_attention.reference import packed_attention_reference
from megavlm_kernels.testing.tolerance import errors_against_truth, forward_and_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LENGTHS = [70, 0, 1, 129, 54, 1]
LATER = Segments((64, 100), (200, 100), (0, 100))
SEGMENTS = [Segments.of(LENGTHS), Segments.of([64] * 4), LATER]


def inputs(segments: Segments, width: int, groups: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    keys = sum(segments.key_lengths) if segments.key_starts is None else 200
    rows = [(sum(segments.query_lengths), 4), (keys, groups), (keys, groups)]
    return [torch.randn(n, heads, width, generator=generator).to("cuda", dtype).requires_grad_() for n, heads in rows]


def attend(backend: str, x: list[torch.Tensor], segments: Segments, **options: Any) -> list[torch.Tensor]:
    """Forward and gradients; skips what this machine has not, with its reason."""
    call = call_of(x[0], segments, options.get("window"), options.get("softcap"))
    try:
        choose(call, machine_of("cuda", x[0].device.index), backend)
    except BackendError as error:
        pytest.skip(str(error))
    upstream = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(1)).to(x[0].device)
    return forward_and_gradients(lambda *a: packed_attention(*a, segments, backend=backend, **options), x, upstream)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 1), (True, 16)])
@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("width", "groups"), [(64, 4), (128, 1), (72, 2), (20, 2)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_fp64(
    backend: str, width: int, groups: int, segments: Segments, causal: bool, window: int | None, softcap: float | None
) -> None:
    options: dict[str, Any] = {"causal": causal, "window": window, "softcap": softcap}
    x = inputs(segments, width, groups, torch.bfloat16)
    got = attend(backend, x, segments, **options)
    upstream = torch.randn(x[0].shape, generator=torch.Generator().manual_seed(1))

    def dense(*a: torch.Tensor) -> torch.Tensor:
        return packed_attention_reference(*a, segments, **options)

    exact = [y.detach().cpu().double().requires_grad_() for y in x]
    eager = [y.detach().cpu().requires_grad_() for y in x]
    truth, same_format = forward_and_gradients(dense, exact, upstream.double()), forward_and_gradients(dense, eager, upstream)
    names, got = ["out", "query", "key", "value"], [g.cpu() for g in got]
    if window == 1:
        # A row that sees itself alone has no gradient of scores: the truth is 0, and a kernel's rounding of `out` is what is left.
        rows = float(upstream.norm(dim=-1).max() * truth[0].norm(dim=-1).max()) * torch.finfo(torch.bfloat16).eps * width**-0.5
        for gradient, other in ((got[1], x[1]), (got[2], x[0])):
            assert float(gradient.abs().max()) <= rows * float(other.detach().abs().max()) * 4 / groups
        names, got, same_format, truth = (values[::3] for values in (names, got, same_format, truth))
    assert not errors_against_truth(got, same_format, truth, names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_other_segments_do_not_change_by_a_bit(backend: str) -> None:
    """Also that the backward pass is repeatable where torch is asked for determinism."""
    segments = Segments.of(LENGTHS)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        x = inputs(segments, 64, 2, torch.bfloat16)
        before = attend(backend, x, segments, causal=True)
        again = attend(backend, x, segments, causal=True)
        assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True))
        other = [y.detach().clone() for y in x]
        for y in other:
            y[71:200] += 1.0
        after = attend(backend, [y.requires_grad_() for y in other], segments, causal=True)
    finally:
        torch.use_deterministic_algorithms(False)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old[:71], new[:71]) and torch.equal(old[200:], new[200:])
        assert not torch.equal(old[71:200], new[71:200])
