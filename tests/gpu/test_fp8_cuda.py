"""FP8 and fp16 on a GPU: the cast's kernels bit by bit, the layer through cuBLAS, training through each backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.testing.own_process import train_apart
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm_kernels.fp8_cast import E4M3, E5M2, fp8_cast
from megavlm_kernels.fp8_cast import reference as cast_reference
from megavlm_kernels.fp8_linear import Fp8Format, fp8_linear
from megavlm_kernels.fp8_linear.reference import fp8_linear as truth
from megavlm_kernels.packed_attention import machine_of

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

MODEL = {"vision": {"hidden_size": 64, "ffn_hidden_size": 128}, "language": {"hidden_size": 64, "ffn_hidden_size": 128}}


def needs_fp8() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no FP8 before compute capability 8.9")


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("source", [torch.bfloat16, torch.float16, torch.float32])
def test_cast_kernels_round_as_torch_does(dtype: torch.dtype, by_row: bool, source: torch.dtype) -> None:
    needs_fp8()
    x = (torch.randn(333, 528, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 3, 528)).to(source)
    got = fp8_cast(x.cuda(), dtype, by_row=by_row, transpose=True)
    want = cast_reference.fp8_cast(x, dtype, by_row=by_row, transpose=True)
    for a, b in zip(got, want, strict=True):
        assert a is not None and b is not None and torch.equal(a.cpu().float(), b.float())


@pytest.mark.parametrize("form", [Fp8Format(), Fp8Format(by_row=True), Fp8Format(hybrid=False)])
@pytest.mark.parametrize("rows", [1, 17, 256])
def test_layer_equals_products_of_rounded_operands(form: Fp8Format, rows: int) -> None:
    needs_fp8()
    generator = torch.Generator().manual_seed(3)
    x, weight, grad = (torch.randn(*size, generator=generator).bfloat16() for size in ((rows, 256), (384, 256), (rows, 384)))
    a, b = x.cuda().requires_grad_(), weight.cuda().requires_grad_()
    out = fp8_linear(a, b, form=form)
    out.backward(grad.cuda())
    assert a.grad is not None and b.grad is not None
    for got, want in zip((out, a.grad, b.grad), truth(x, weight, grad, by_row=form.by_row, hybrid=form.hybrid), strict=True):
        # bf16 out, and in the forward Hopper's fast accumulation, which keeps 14 bits of a sum.
        assert (got.double().cpu() - want).norm() <= 6e-3 * want.norm()


def losses(folder: Path, data_dir: Path, precision: dict[str, Any]) -> list[float]:
    run: dict[str, Any] = {"device": "cuda", "deterministic": False}
    return train_apart(tiny_recipe(folder / "run", data_dir, [tiny_stage(steps=4)], run=run, precision=precision, model=MODEL)).losses


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, data_dir: Path) -> list[float]:
    return losses(tmp_path_factory.mktemp("fp32"), data_dir, {"dtype": "fp32"})


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [
        ({"dtype": "fp16"}, 1e-2),
        ({"fp8": "current", "fp8_backend": "scaled_mm"}, 5e-2),
        ({"fp8": "rowwise", "keep_bf16": []}, 5e-2),
        ({"fp8": "current", "fp8_backend": "transformer_engine"}, 5e-2),
        ({"fp8": "current", "fp8_backend": "transformer_engine", "keep_bf16": ["projector", "mlp"]}, 5e-2),
        ({"fp8": "delayed", "fp8_amax_history_len": 4, "keep_bf16": ["vision", "projector"]}, 2e-1),
        ({"fp8": "blockwise"}, 5e-2),
    ],
)
def test_training_stays_close_to_fp32(
    precision: dict[str, Any], tolerance: float, reference: list[float], data_dir: Path, tmp_path: Path
) -> None:
    """Encoder tiles have 37 rows: Transformer Engine alone would refuse them."""
    if precision.get("fp8") in ("delayed", "blockwise") or precision.get("fp8_backend") == "transformer_engine":
        from megavlm.planner.precision import machine_stops

        reason = machine_stops("transformer_engine", precision["fp8"], machine_of("cuda"))
        if reason is not None:
            pytest.skip(reason)
    elif "fp8" in precision:
        needs_fp8()
    assert losses(tmp_path, data_dir, precision) == pytest.approx(reference, rel=tolerance)
