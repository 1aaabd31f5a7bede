"""Replaced rows: bits of torch's own indexing, gradients of it, odd shapes, nothing replaced, everything replaced."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from megavlm_kernels.scatter_features import scatter_features
from megavlm_kernels.scatter_features.reference import scatter_features_reference
from megavlm_kernels.testing.interpreter import Interpreter
from megavlm_kernels.testing.tolerance import errors_against_truth, forward_and_gradients

NAMES = ["out", "gradient of x", "gradient of the features"]
Run = Callable[..., list[torch.Tensor]]


@pytest.fixture(params=["torch", "triton"])
def run(request: pytest.FixtureRequest) -> Run:
    """`forward_and_gradients` of `scatter_features`, in plain torch and interpreted."""
    if request.param == "torch":
        return partial(forward_and_gradients, scatter_features)
    return partial(request.getfixturevalue("interpreter").run, forward_and_gradients, scatter_features)


def inputs(
    rows: int, shape: tuple[int, ...], replaced: int, dtype: torch.dtype, features: torch.dtype | None = None
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """[x, features, positions in no order], and an upstream gradient."""
    generator = torch.Generator().manual_seed(rows + replaced)
    x, upstream = (torch.randn(rows, *shape, generator=generator).to(dtype) for _ in range(2))
    own = torch.randn(replaced, *shape, generator=generator).to(features or dtype)
    return [x.requires_grad_(), own.requires_grad_(), torch.randperm(rows, generator=generator)[:replaced]], upstream


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "shape", "replaced"), [(9, (16,), 4), (7, (1, 13), 7), (6, (1, 1100), 3), (5, (1, 1024), 1), (4, (3,), 0), (0, (1, 8), 0)]
)
def test_bits_of_indexing(run: Run, rows: int, shape: tuple[int, ...], replaced: int, dtype: torch.dtype) -> None:
    tensors, upstream = inputs(rows, shape, replaced, dtype)
    want = forward_and_gradients(scatter_features_reference, tensors, upstream)
    for got, other in zip(run(tensors, upstream), want, strict=True):
        assert got.dtype == other.dtype and torch.equal(got, other)


@pytest.mark.parametrize(("dtype", "features"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_features_of_another_format(run: Run, dtype: torch.dtype, features: torch.dtype) -> None:
    tensors, upstream = inputs(8, (1, 40), 5, dtype, features)
    exact = [*(t.detach().double().requires_grad_() for t in tensors[:2]), tensors[2]]
    eager, truth = (forward_and_gradients(scatter_features_reference, t, upstream) for t in (tensors, exact))
    got = run(tensors, upstream)
    assert [t.dtype for t in got] == [dtype, dtype, features]
    assert errors_against_truth(got, eager, truth, NAMES) == []


@pytest.mark.parametrize("frozen", [0, 1])
def test_one_gradient_alone(run: Run, frozen: int) -> None:
    """A frozen embedding, or features without a gradient."""
    tensors, upstream = inputs(8, (1, 12), 5, torch.float32)
    whole = run(tensors, upstream)
    got = run([t.detach() if i == frozen else t for i, t in enumerate(tensors)], upstream)
    assert len(got) == 2 and torch.equal(got[0], whole[0]) and torch.equal(got[1], whole[2 - frozen])


def test_rows_apart(run: Run) -> None:
    """Every second row, a row that is repeated by strides, and columns apart."""
    (x, features, positions), upstream = inputs(8, (12,), 4, torch.float32)
    for view in (torch.cat([x, x]).detach()[::2], x.detach()[:1].expand(8, -1), x.detach().T.contiguous().T):
        tensors = [view.requires_grad_(), features, positions]
        want = forward_and_gradients(scatter_features_reference, tensors, upstream.T.contiguous().T)
        assert all(torch.equal(a, b) for a, b in zip(run(tensors, upstream.T.contiguous().T), want, strict=True))


def test_a_feature_reaches_its_row_only(run: Run) -> None:
    (x, features, positions), upstream = inputs(9, (1, 24), 4, torch.bfloat16)
    changed = features.detach().clone()
    changed[2] += 1.0
    before, after = (run([x, f, positions], upstream)[0] for f in (features, changed.requires_grad_()))
    same = torch.arange(9) != positions[2]
    assert torch.equal(before[same], after[same]) and not torch.equal(before[~same], after[~same])


def test_gradients_in_fp64() -> None:
    (x, features, positions), _ = inputs(6, (1, 5), 3, torch.float64)
    assert torch.autograd.gradcheck(partial(scatter_features, positions_N=positions), (x, features))


def test_what_cannot_be(interpreter: Interpreter) -> None:
    x = torch.zeros(4, 1, 8)
    for features, positions in [(torch.zeros(2, 1, 8), torch.arange(3)), (torch.zeros(2, 1, 7), torch.arange(2))]:
        with pytest.raises(ValueError, match="one position each"):
            scatter_features(x, features, positions)
    for call in (scatter_features, partial(interpreter.run, scatter_features)):
        with pytest.raises(IndexError):
            call(x, torch.zeros(1, 1, 8), torch.tensor([4]))
