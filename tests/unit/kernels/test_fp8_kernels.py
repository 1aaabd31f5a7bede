"""FP8: the cast bit by bit against plain torch, the layer against fp64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from megavlm_kernels.fp8_cast import E4M3, E5M2, Fp8Matrix, fp8_cast
from megavlm_kernels.fp8_cast import reference as cast_reference
from megavlm_kernels.fp8_linear import Fp8Format, cast_weight, fp8_linear, whatever_stops_scaled_mm
from megavlm_kernels.fp8_linear.reference import fp8_linear as truth
from megavlm_kernels.testing.interpreter import Interpreter

FORMS = [Fp8Format(by_row, hybrid) for by_row, hybrid in itertools.product((False, True), (True, False))]


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    """Columns of very different sizes, so that scales differ and small ones fall below the format's range."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=generator) * torch.logspace(-4, 3, columns)).to(dtype)


def bits(cast: Fp8Matrix) -> list[torch.Tensor | None]:
    """Values; a zero is a zero, whatever its sign."""
    return [None if x is None else x.float() for x in cast]


# ------------------------------------------------------------------------------------------------------------------- cast


def test_scales_are_the_smallest_powers_of_two_that_fit() -> None:
    values = torch.tensor([448.0, 448.5, 447.0, 1.0, 0.875, 0.876, 1e-30, 3e38, 2.0**-149, 0.0])
    for dtype, top in ((E4M3, 448.0), (E5M2, 57344.0)):
        scale = cast_reference.power_of_two(values, dtype)
        assert torch.equal(torch.frexp(scale)[0], torch.full_like(scale, 0.5)), "powers of two"
        assert (values / scale <= top).all()
        ordinary = (values > 1e-30) & (values < 1e38)
        assert (values / (scale / 2) > top)[ordinary].all(), "half of it would not fit"
        assert scale[-1] == 1.0


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("by_row", [False, True])
def test_cast_is_near_and_padded(dtype: torch.dtype, by_row: bool) -> None:
    x = torch.randn(37, 48, generator=torch.Generator().manual_seed(1))
    cast = fp8_cast(x, dtype, by_row=by_row, transpose=True)
    assert cast.data_PC.shape == (48, 48) and cast.data_CP is not None and cast.data_CP.shape == (48, 48) and cast.scale_C is not None
    back = cast.data_PC.float() * cast.scale
    step = 2.0**-4 if dtype == E4M3 else 2.0**-3
    assert ((back[:37] - x).abs() <= step * x.abs() + 1e-4).all() and (back[37:] == 0).all()
    turned = cast.data_CP.float() * cast.scale_C
    assert ((turned[:, :37].T - x).abs() <= step * x.abs() + 1e-4).all() and (turned[:, 37:] == 0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("by_row", [False, True])
def test_what_is_no_number_passes_for_none(bad: float, by_row: bool) -> None:
    x = torch.ones(4, 16)
    x[2, 3] = bad
    cast = fp8_cast(x, E4M3, by_row=by_row, transpose=True)
    assert cast.data_CP is not None
    rows, columns = (data.float().isnan()[:4, :4] for data in (cast.data_PC, cast.data_CP))
    # FP8 has no infinity to hand on, and casts saturate: everything with the same scale shows it.
    assert rows[2].all() and columns[3].all()
    others = torch.cat([rows[:2].flatten(), columns[:3].flatten()])
    # Padding rows are zeros written with a scale of their own.
    assert not others.any() if by_row else others.all()


def cast_all(x: torch.Tensor) -> list[list[torch.Tensor | None]]:
    """Every way of casting: by kernels under the interpreter, by plain torch elsewhere."""
    choices = itertools.product((E4M3, E5M2), (False, True), (False, True))
    return [bits(fp8_cast(x, dtype, by_row=by_row, transpose=transpose)) for dtype, by_row, transpose in choices]


@pytest.mark.parametrize(("shape", "dtype"), [((1, 16), torch.bfloat16), ((70, 66), torch.float32), ((16, 65), torch.float16)])
def test_kernels_equal_plain_torch(shape: tuple[int, int], dtype: torch.dtype, interpreter: Interpreter) -> None:
    x = matrix(*shape, dtype)
    for got, want in zip(interpreter.run(cast_all, x), cast_all(x), strict=True):
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or torch.equal(a, b)


def cast_transposed(x: torch.Tensor) -> list[torch.Tensor | None]:
    return bits(fp8_cast(x.T, E4M3, by_row=True, transpose=True))


def test_kernels_take_any_strides_and_zeros(interpreter: Interpreter) -> None:
    overflowing = torch.ones(3, 32)
    overflowing[1, 2] = float("inf")
    for x in (matrix(20, 48), torch.zeros(5, 32), overflowing):
        for a, b in zip(interpreter.run(cast_transposed, x), cast_transposed(x), strict=True):
            assert a is not None and b is not None and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def test_no_rows() -> None:
    cast = fp8_cast(torch.empty(0, 32), E4M3, by_row=True, transpose=True)
    assert cast.data_PC.shape == (0, 32) and cast.data_CP is not None and cast.data_CP.shape == (32, 0)


# ------------------------------------------------------------------------------------------------------------------ layer


def run_layer(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor, form: Fp8Format, **options: object) -> list[torch.Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    out = fp8_linear(x, weight, form=form, **options)  # type: ignore[arg-type]
    out.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return [out.detach(), x.grad, weight.grad]


def inputs(rows: int, width: int = 64, outputs: int = 96, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    sizes = ((rows, width), (outputs, width), (rows, outputs))
    return tuple(torch.randn(*size, generator=generator).to(dtype) for size in sizes)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_rounded_operands(form: Fp8Format) -> None:
    """In fp32 out nothing but the operands is rounded: all three products equal fp64's of what FP8 holds."""
    x, weight, grad = inputs(48)
    for got, want in zip(run_layer(x, weight, grad, form), truth(x, weight, grad, by_row=form.by_row, hybrid=form.hybrid), strict=True):
        assert relative(got, want) < 2e-6


@pytest.mark.parametrize("form", FORMS)
def test_only_the_forward_pass_takes_short_sums(form: Fp8Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of weights are sums over all tokens; also where they are e4m3."""
    fast: list[bool] = []
    real = torch._scaled_mm

    def spy(*args: Any, use_fast_accum: bool, **options: Any) -> Any:
        fast.append(use_fast_accum)
        return real(*args, use_fast_accum=use_fast_accum, **options)

    monkeypatch.setattr(torch, "_scaled_mm", spy)
    run_layer(*inputs(32), form)
    assert fast == [True, False, False]


@pytest.mark.parametrize(
    ("form", "bounds"),
    [
        (Fp8Format(), (0.040, 0.062, 0.062)),
        (Fp8Format(by_row=True), (0.040, 0.062, 0.062)),
        (Fp8Format(by_row=True, hybrid=False), (0.040, 0.040, 0.040)),
    ],
)
def test_errors_against_exact_products(form: Fp8Format, bounds: tuple[float, ...]) -> None:
    """Relative errors of output and gradients; bf16's are about 0.002. Two significant bits (e5m2) or three (e4m3) do no better."""
    x, weight, grad = (t.double() for t in inputs(256, 128, 128))
    exact = (x @ weight.T, grad @ weight, grad.T @ x)
    got = run_layer(x.bfloat16(), weight.bfloat16(), grad.bfloat16(), form)
    errors = [relative(a, b) for a, b in zip(got, exact, strict=True)]
    assert all(bound / 3 < error < bound for error, bound in zip(errors, bounds, strict=True)), errors


@pytest.mark.parametrize("form", FORMS[:3:2])
@pytest.mark.parametrize("rows", [1, 15, 17, 37])
def test_any_number_of_rows_equals_the_same_padded(rows: int, form: Fp8Format) -> None:
    x, weight, grad = inputs(rows, dtype=torch.bfloat16)
    padding = -rows % 16
    padded = run_layer(*(torch.nn.functional.pad(t, (0, 0, 0, padding)) if t is not weight else t for t in (x, weight, grad)), form)
    out, grad_x, grad_weight = run_layer(x, weight, grad, form)
    assert torch.equal(out, padded[0][:rows]) and torch.equal(grad_x, padded[1][:rows]) and torch.equal(grad_weight, padded[2])
    assert all(t.isfinite().all() for t in (out, grad_x, grad_weight))


@pytest.mark.parametrize("form", FORMS[:3:2])
def test_no_rows_at_all(form: Fp8Format) -> None:
    out, grad_x, grad_weight = run_layer(*inputs(0), form)
    assert out.shape == (0, 96) and grad_x.shape == (0, 64) and (grad_weight == 0).all()


def test_shapes_bias_and_a_weight_cast_before() -> None:
    x, weight, _ = inputs(24)
    bias = torch.randn(96, requires_grad=True)
    form = Fp8Format()
    plain = fp8_linear(x, weight, form=form)
    out = fp8_linear(x.view(24, 1, 64), weight, bias, form=form, cast=cast_weight(weight, form, transpose=True))
    assert torch.equal(out, (plain + bias).view(24, 1, 96))
    out.sum().backward()
    assert bias.grad is not None and torch.equal(bias.grad, torch.full((96,), 24.0))


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_a_frozen_side_takes_no_gradient_and_keeps_nothing(frozen: str) -> None:
    x, weight, grad = inputs(32)
    x.requires_grad_(frozen != "input")
    weight.requires_grad_(frozen != "weight")
    kept: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        out = fp8_linear(x, weight)
    out.backward(grad)
    moving, still = (weight, x) if frozen == "input" else (x, weight)
    assert moving.grad is not None and still.grad is None
    matrices = [shape for shape in kept if len(shape) == 2]
    assert matrices == [(64, 32)] if frozen == "input" else matrices == [(64, 96)]


def test_widths_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"24 x 64 cannot be multiplied in FP8: both must be multiples of 16"):
        fp8_linear(torch.ones(4, 64), torch.ones(24, 64))


def test_who_can() -> None:
    assert whatever_stops_scaled_mm("cpu", None) is None
    assert whatever_stops_scaled_mm("cuda", (8, 9)) is None and whatever_stops_scaled_mm("cuda", (9, 0)) is None
    assert "8.9 (Ada, Hopper) or higher, this one has 8.0" in str(whatever_stops_scaled_mm("cuda", (8, 0)))
