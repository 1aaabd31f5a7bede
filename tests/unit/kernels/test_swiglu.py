"""Gated linear units against the formula in fp64: every activation and format, odd widths, rows apart, no rows."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from megavlm_kernels.swiglu import gated_linear_unit
from megavlm_kernels.swiglu.op import FEW_ELEMENTS
from megavlm_kernels.swiglu.reference import ACTIVATIONS, gated_linear_unit_reference
from megavlm_kernels.testing.interpreter import Interpreter
from megavlm_kernels.testing.tolerance import errors_against_truth, forward_and_gradients

NAMES = ["out", "gradient"]


def wrong(got: list[torch.Tensor], x: torch.Tensor, upstream: torch.Tensor, activation: str) -> list[str]:
    reference = partial(gated_linear_unit_reference, activation=activation)
    truth = forward_and_gradients(reference, [x.detach().double().requires_grad_()], upstream)
    return errors_against_truth(got, forward_and_gradients(reference, [x], upstream), truth, NAMES)


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(shape[-1])
    x = 3 * torch.randn(*shape[:-1], 2 * shape[-1], generator=generator)
    return x.to(dtype).requires_grad_(), torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 16), (5, 7), (2, 3, 1100), (1, 1024)])
def test_triton(interpreter: Interpreter, shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    x, upstream = inputs(shape, dtype)
    got = interpreter.run(forward_and_gradients, partial(gated_linear_unit, activation=activation), [x], upstream)
    assert wrong(got, x, upstream, activation) == []


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_far_gates(interpreter: Interpreter, activation: str) -> None:
    """Where exponentials overflow and slopes vanish; and at zero."""
    gate = torch.tensor([-1e4, -90.0, -20.0, -1e-3, 0.0, 1e-3, 20.0, 90.0, 1e4])
    x = torch.cat([gate, torch.ones(9)])[None].requires_grad_()
    upstream = torch.ones(1, 9)
    got = interpreter.run(forward_and_gradients, partial(gated_linear_unit, activation=activation), [x], upstream)
    want = forward_and_gradients(
        partial(gated_linear_unit_reference, activation=activation), [x.detach().double().requires_grad_()], upstream
    )
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_torch(activation: str) -> None:
    x, upstream = inputs((4, 9), torch.float32)
    got = forward_and_gradients(partial(gated_linear_unit, activation=activation), [x], upstream)
    assert wrong(got, x, upstream, activation) == []
    double = x.detach().double().requires_grad_()
    if activation != "relu":
        assert torch.autograd.gradcheck(partial(gated_linear_unit, activation=activation), (double,))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(400, 1001), (1, 40000), (3, 7, 5000)])
def test_blocks_of_torch(shape: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
    """Rows that are no multiple of a block, one row that is larger than a block, leading dimensions."""
    assert 2 * math.prod(shape) > FEW_ELEMENTS
    x, upstream = inputs(shape, dtype)
    got = forward_and_gradients(partial(gated_linear_unit, activation=activation), [x], upstream)
    assert wrong(got, x, upstream, activation) == []


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_blocks_keep_their_input_only(activation: str) -> None:
    x, upstream = inputs((300, 256), torch.float32)
    kept: set[int] = set()

    def note(t: torch.Tensor) -> torch.Tensor:
        kept.add(t.untyped_storage().data_ptr())
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = gated_linear_unit(x, activation)
    assert kept == {x.untyped_storage().data_ptr()}
    # Rows apart, and an upstream gradient that is an expanded number.
    apart = torch.cat([x, x], dim=1).detach()[::2, :512].requires_grad_()
    ones = torch.ones(()).expand(150, 256)
    assert wrong(forward_and_gradients(partial(gated_linear_unit, activation=activation), [apart], ones), apart, ones, activation) == []
    assert out.shape == upstream.shape


def test_rows_that_lie_apart(interpreter: Interpreter) -> None:
    wide = torch.randn(6, 3, 80, generator=torch.Generator().manual_seed(1))
    for x in (wide[..., 8:40], wide[:, ::2, :32], wide[:, 1, ::2], wide[:, 0, :6].T[:, :6]):
        for upstream in (torch.ones(()).expand(*x.shape[:-1], x.shape[-1] // 2), x[..., ::2]):
            pair = x.detach().requires_grad_()
            assert wrong(interpreter.run(forward_and_gradients, gated_linear_unit, [pair], upstream), pair, upstream, "silu") == []


def test_no_rows(interpreter: Interpreter) -> None:
    x, upstream = inputs((0, 2, 8), torch.bfloat16)
    for run in (forward_and_gradients, partial(interpreter.run, forward_and_gradients)):
        out, grad = run(gated_linear_unit, [x], upstream)
        assert out.shape == (0, 2, 8) and grad.shape == (0, 2, 16)


def test_a_row_does_not_depend_on_the_others(interpreter: Interpreter) -> None:
    x, upstream = inputs((6, 40), torch.float32)
    changed = x.detach().clone()
    changed[2] += 1.0
    before, after = (interpreter.run(forward_and_gradients, gated_linear_unit, [t], upstream) for t in (x, changed.requires_grad_()))
    same = torch.arange(6) != 2
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[same], b[same]) and not torch.equal(a[2], b[2])


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="choose from silu"):
        gated_linear_unit(torch.ones(2, 4), "swish")
    with pytest.raises(ValueError, match="7 columns"):
        gated_linear_unit(torch.ones(2, 7))
