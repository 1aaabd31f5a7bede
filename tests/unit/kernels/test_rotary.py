"""Rotary positions against the formula in fp64: partial width, tables of unequal halves, views, no rows; the rotation turns back."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megavlm_kernels.rotary import op, rotary
from megavlm_kernels.rotary.reference import rotary_reference
from megavlm_kernels.testing.interpreter import Interpreter
from megavlm_kernels.testing.tolerance import errors_against_truth, forward_and_gradients

NAMES = ["out", "gradient"]
SHAPES = [(5, 3, 16, 16), (9, 2, 80, 80), (4, 5, 12, 6), (3, 33, 96, 48), (2, 1, 2, 2)]


def inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, table: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, cos, sin, upstream. Every pair turns by its own angle, and cosines are scaled, as YaRN does."""
    rows, heads, width, turned = shape
    generator = torch.Generator().manual_seed(width)
    x, upstream = (torch.randn(rows, heads, width, generator=generator).to(dtype) for _ in range(2))
    angle = 100 * torch.rand(rows, turned // 2, generator=generator)
    angle = torch.cat([angle, angle], dim=-1)
    return x.requires_grad_(), (1.1 * angle.cos()).to(table), (1.1 * angle.sin()).to(table), upstream


def wrong(got: list[torch.Tensor], x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, upstream: torch.Tensor) -> list[str]:
    truth = forward_and_gradients(rotary_reference, [x.detach().double().requires_grad_(), cos.double(), sin.double()], upstream)
    return errors_against_truth(got, forward_and_gradients(rotary_reference, [x, cos, sin], upstream), truth, NAMES)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors take the way of large ones, two rows at a time or so."""
    monkeypatch.setattr("megavlm_kernels.blocks.BLOCK_ELEMENTS", 120)
    monkeypatch.setattr(op, "FEW_ELEMENTS", 0)


FORMATS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


@pytest.mark.parametrize(("dtype", "table"), FORMATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["few", "blocks", "triton"])
def test_formats_and_shapes(
    way: str, shape: tuple[int, int, int, int], dtype: torch.dtype, table: torch.dtype, request: pytest.FixtureRequest
) -> None:
    given = inputs(shape, dtype, table)
    if way == "blocks":
        request.getfixturevalue("small_blocks")
    run = forward_and_gradients if way != "triton" else partial(request.getfixturevalue("interpreter").run, forward_and_gradients)
    assert wrong(run(rotary, list(given[:3]), given[3]), *given) == []


@pytest.mark.usefixtures("small_blocks")
def test_gradcheck_with_unequal_halves() -> None:
    x, _, _, _ = inputs((5, 3, 10, 8), torch.float64, torch.float64)
    cos, sin = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (x,))
    assert torch.allclose(rotary(x, cos, sin), rotary_reference(x, cos, sin), rtol=0, atol=1e-14)


def test_unequal_halves(interpreter: Interpreter) -> None:
    x, _, _, upstream = inputs((5, 3, 10, 8), torch.float32, torch.float32)
    cos, sin = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    assert wrong(interpreter.run(forward_and_gradients, rotary, [x, cos, sin], upstream), x, cos, sin, upstream) == []


@pytest.mark.parametrize("way", ["blocks", "triton"])
def test_views(way: str, request: pytest.FixtureRequest) -> None:
    """Heads cut out of one projection, transposed heads, tables expanded from one row, expanded gradients."""
    if way == "blocks":
        request.getfixturevalue("small_blocks")
    run = forward_and_gradients if way == "blocks" else partial(request.getfixturevalue("interpreter").run, forward_and_gradients)
    wide = torch.randn(6, 8, 40, generator=torch.Generator().manual_seed(1))
    _, cos, sin, _ = inputs((6, 1, 16, 16), torch.float32, torch.float32)
    views = (wide[:, 2:5, 8:24], wide[:, :, :32:2], wide.transpose(1, 2)[:, :16].transpose(1, 2))
    pairs = ((cos, sin), (cos[:1].expand(6, 16), sin[:1].expand(6, 16)), (cos.T.contiguous().T, sin))
    for x, tables in zip(views, pairs, strict=True):
        for upstream in (torch.ones(()).expand(x.shape), x.flip(0)):
            turned = x.detach().requires_grad_()
            assert wrong(run(rotary, [turned, *tables], upstream), turned, *tables, upstream) == []


def test_no_rows_and_no_heads(interpreter: Interpreter) -> None:
    for shape in ((0, 3, 8), (3, 0, 8)):
        x, tables = torch.zeros(shape).requires_grad_(), [torch.zeros(shape[0], 8)] * 2
        for run in (forward_and_gradients, partial(interpreter.run, forward_and_gradients)):
            assert [t.shape for t in run(rotary, [x, *tables], torch.zeros(shape))] == [shape, shape]


def test_it_turns_back(interpreter: Interpreter) -> None:
    """Pure rotations keep lengths, and the gradient of the turned x is x."""
    x, cos, sin, _ = inputs((4, 3, 32, 32), torch.float32, torch.float32)
    cos, sin = cos / 1.1, sin / 1.1
    out = interpreter.run(forward_and_gradients, rotary, [x, cos, sin], torch.zeros_like(x))[0]
    back = interpreter.run(forward_and_gradients, rotary, [x, cos, sin], out)[1]
    assert torch.allclose(out.norm(dim=-1), x.norm(dim=-1), rtol=1e-6) and torch.allclose(back, x, atol=1e-6)
    assert not torch.allclose(out, x, atol=0.1)


@pytest.mark.parametrize("tables", [(4, 8), (5, 7), (5, 12)])
def test_tables_that_do_not_fit(tables: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not rotate"):
        rotary(torch.zeros(5, 2, 10), torch.zeros(tables), torch.zeros(tables))
