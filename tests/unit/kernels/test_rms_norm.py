"""RMSNorm against the formula in fp64: plain torch and interpreted Triton, every format, odd shapes, rows apart, no rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from megavlm_kernels.rms_norm import op, rms_norm
from megavlm_kernels.rms_norm.reference import rms_norm_reference
from megavlm_kernels.testing.interpreter import Interpreter
from megavlm_kernels.testing.tolerance import errors_against_truth, forward_and_gradients

EPS = 1e-5
NAMES = ["out", "gradient of x", "gradient of weight"]
SHAPES = [(3, 16), (5, 7), (2, 3, 100), (37, 64), (130, 8)]


def inputs(shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, zero_centered: bool) -> list[torch.Tensor]:
    """x, weight and the upstream gradient."""
    generator = torch.Generator().manual_seed(shape[-1])
    x, upstream = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(shape[-1], generator=generator, dtype=torch.float64) * 0.2 + (0.0 if zero_centered else 1.0)
    return [(3 * x).to(dtype).requires_grad_(), weight.to(weight_dtype).requires_grad_(), upstream.to(dtype)]


def wrong(got: list[torch.Tensor], x: torch.Tensor, weight: torch.Tensor, upstream: torch.Tensor, zero_centered: bool) -> list[str]:
    reference = partial(rms_norm_reference, eps=EPS, zero_centered=zero_centered)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    truth = forward_and_gradients(reference, exact, upstream)
    return errors_against_truth(got, forward_and_gradients(reference, [x, weight], upstream), truth, NAMES)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tensors take the way of large ones."""
    monkeypatch.setattr("megavlm_kernels.blocks.BLOCK_ELEMENTS", 200)
    monkeypatch.setattr(op, "BLOCK_ELEMENTS", 200)
    monkeypatch.setattr(op, "FEW_ELEMENTS", 0)


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)],
)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("way", ["few", "one block", "blocks"])
def test_torch(
    way: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    zero_centered: bool,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if way == "blocks":
        request.getfixturevalue("small_blocks")
    elif way == "one block":
        monkeypatch.setattr(op, "FEW_ELEMENTS", 0)
    x, weight, upstream = inputs(shape, dtype, weight_dtype, zero_centered)
    got = forward_and_gradients(partial(rms_norm, eps=EPS, zero_centered=zero_centered), [x, weight], upstream)
    assert wrong(got, x, weight, upstream, zero_centered) == []
    with torch.no_grad():
        assert torch.equal(rms_norm(x, weight, EPS, zero_centered=zero_centered), got[0])


@pytest.mark.usefixtures("small_blocks")
def test_gradcheck() -> None:
    x, weight, _ = inputs((29, 12), torch.float64, torch.float64, True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, zero_centered=True), (x, weight))


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_triton(
    interpreter: Interpreter, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, zero_centered: bool
) -> None:
    x, weight, upstream = inputs(shape, dtype, weight_dtype, zero_centered)
    function = partial(rms_norm, eps=EPS, zero_centered=zero_centered)
    got = interpreter.run(forward_and_gradients, function, [x, weight], upstream)
    assert wrong(got, x, weight, upstream, zero_centered) == []


@pytest.mark.parametrize("trained", ["x", "weight"])
@pytest.mark.parametrize("width", [24, 4100])
def test_triton_gives_one_gradient(interpreter: Interpreter, trained: str, width: int) -> None:
    """Frozen norms, inputs that want no gradient; and above 4096 columns the two gradients come from two launches."""
    x, weight, upstream = inputs((5, width), torch.float32, torch.float32, False)
    both = interpreter.run(forward_and_gradients, partial(rms_norm, eps=EPS), [x, weight], upstream)
    assert wrong(both, x, weight, upstream, False) == []
    (weight if trained == "x" else x).requires_grad_(False)
    one = interpreter.run(forward_and_gradients, partial(rms_norm, eps=EPS), [x, weight], upstream)
    assert len(one) == 2 and torch.equal(one[1], both[1 if trained == "x" else 2])


@pytest.mark.parametrize("way", ["torch", "triton"])
def test_rows_that_lie_apart(interpreter: Interpreter, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query heads cut out of a projection, transposed pictures, an expanded gradient."""
    monkeypatch.setattr(op, "FEW_ELEMENTS", 0)
    wide = torch.randn(9, 4, 40, generator=torch.Generator().manual_seed(1))
    weight = torch.linspace(0.5, 1.5, 16)
    for x in (wide[..., 4:20], wide[:, :, ::2][..., :16], wide[:, 1, :16], wide[:, 0, :32].T[:16].T):
        for upstream in (torch.ones(()).expand(x.shape), x.flip(0).transpose(0, 1).contiguous().transpose(0, 1)):
            pair = [x.detach().requires_grad_(), weight.clone().requires_grad_()]
            function = partial(rms_norm, eps=EPS)
            run = forward_and_gradients if way == "torch" else partial(interpreter.run, forward_and_gradients)
            assert wrong(run(function, pair, upstream), pair[0], pair[1], upstream, False) == []


@pytest.mark.parametrize("way", ["torch", "triton"])
def test_no_rows(interpreter: Interpreter, way: str) -> None:
    x, weight, upstream = inputs((0, 3, 32), torch.bfloat16, torch.bfloat16, False)
    run = forward_and_gradients if way == "torch" else partial(interpreter.run, forward_and_gradients)
    out, grad_x, grad_weight = run(partial(rms_norm, eps=EPS), [x, weight], upstream)
    assert out.shape == grad_x.shape == (0, 3, 32)
    assert torch.equal(grad_weight, torch.zeros(32, dtype=torch.bfloat16))


def test_a_row_does_not_depend_on_the_others(interpreter: Interpreter) -> None:
    x, weight, upstream = inputs((20, 64), torch.float32, torch.float32, False)
    changed = x.detach().clone()
    changed[7] += 1.0
    before, after = (
        interpreter.run(forward_and_gradients, partial(rms_norm, eps=EPS), [t, weight], upstream) for t in (x, changed.requires_grad_())
    )
    same = torch.arange(20) != 7
    for a, b in zip(before[:2], after[:2], strict=True):
        assert torch.equal(a[same], b[same]) and not torch.equal(a[7], b[7])


def test_weight_gradient_adds_up_in_fp32(interpreter: Interpreter) -> None:
    """1024 rows of the same sign: a bf16 sum would stop growing after some hundreds."""
    x = torch.ones(1024, 16, dtype=torch.bfloat16).requires_grad_()
    weight = torch.ones(16, dtype=torch.float32).requires_grad_()
    upstream = torch.full((1024, 16), 1.0, dtype=torch.bfloat16)
    for run in (forward_and_gradients, partial(interpreter.run, forward_and_gradients)):
        gradient = run(partial(rms_norm, eps=0.0), [x, weight], upstream)[2]
        assert torch.allclose(gradient, torch.full((16,), 1024.0), rtol=1e-6)
