"""Triton kernels of the element-wise ops on a device: as near to fp64 as eager torch there, the same bits every time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from megavlm_kernels.backend import uses_triton
from megavlm_kernels.normalise_patchify import patches_of_pictures, patches_of_tiles
from megavlm_kernels.normalise_patchify.reference import patches_reference
from megavlm_kernels.rms_norm import rms_norm
from megavlm_kernels.rms_norm.reference import rms_norm_reference
from megavlm_kernels.rotary import rotary
from megavlm_kernels.rotary.reference import rotary_reference
from megavlm_kernels.scatter_features import scatter_features
from megavlm_kernels.scatter_features.reference import scatter_features_reference
from megavlm_kernels.swiglu import gated_linear_unit
from megavlm_kernels.swiglu.reference import ACTIVATIONS, gated_linear_unit_reference
from megavlm_kernels.testing.tolerance import errors_against_truth, forward_and_gradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Function = Callable[..., torch.Tensor]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to("cuda", dtype)


def assert_right(ours: Function, reference: Function, inputs: list[torch.Tensor], upstream: torch.Tensor, num_gradients: int) -> None:
    pytest.importorskip("triton")
    assert uses_triton(inputs[0])
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    got, again = (forward_and_gradients(ours, inputs, upstream) for _ in range(2))
    eager, truth = forward_and_gradients(reference, inputs, upstream), forward_and_gradients(reference, exact, upstream.double())
    names = ["out", *(f"gradient {i}" for i in range(num_gradients))]
    assert errors_against_truth(got, eager, truth, names) == []
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 64), (1, 7), (4100, 10, 64), (3000, 640), (2049, 4096), (600, 8192), (70, 20000)])
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype, zero_centered: bool) -> None:
    """Also wider than the kernels take, where torch's own runs."""
    x, weight = normal(*shape, dtype=dtype).requires_grad_(), normal(shape[-1]).to(dtype).requires_grad_()
    settings: dict[str, Any] = {"eps": 1e-5, "zero_centered": zero_centered}
    upstream = normal(*shape, dtype=dtype)
    assert_right(partial(rms_norm, **settings), partial(rms_norm_reference, **settings), [x, weight], upstream, 2)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 16), (3, 7), (2049, 1728), (70000, 64)])
def test_gated_linear_unit(shape: tuple[int, int], dtype: torch.dtype, activation: str) -> None:
    """Also more rows than a grid's second axis could have."""
    x, upstream = (2 * normal(shape[0], 2 * shape[1], dtype=dtype)).requires_grad_(), normal(*shape, dtype=dtype)
    reference = partial(gated_linear_unit_reference, activation=activation)
    assert_right(partial(gated_linear_unit, activation=activation), reference, [x], upstream, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "width", "turned"), [(10, 64, 64), (32, 128, 128), (16, 80, 80), (40, 96, 48), (1, 2, 2)])
def test_rotary(heads: int, width: int, turned: int, dtype: torch.dtype) -> None:
    whole = normal(2049, heads + 3, width, dtype=dtype)
    x, upstream = whole[:, 1 : heads + 1].detach().requires_grad_(), normal(2049, heads, width, dtype=dtype)
    cos, sin = normal(2, 2049, turned).unbind(0)
    assert_right(rotary, rotary_reference, [x, cos, sin], upstream, 1)


@pytest.mark.parametrize("order", [{}, {"frames": 2}, {"channels_last": True}])
@pytest.mark.parametrize("dtype", DTYPES)
def test_patches_have_the_same_bits(dtype: torch.dtype, order: dict[str, Any]) -> None:
    """As on the CPU."""
    pytest.importorskip("triton")
    mean, inverse_std = torch.tensor([123.675, 116.28, 103.53]), 1.0 / torch.tensor([58.395, 57.12, 57.375])
    tiles = torch.randint(0, 256, (5, 3, 230, 224), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    got = patches_of_tiles(tiles.cuda(), mean.cuda(), inverse_std.cuda(), 14, dtype, **order)
    assert torch.equal(got.cpu(), patches_reference(tiles, mean, inverse_std, 14, dtype, **order))
    grids = [(3, 5), (1, 1), (16, 2)]
    run = tiles.flatten()[: sum(3 * 14 * 14 * rows * columns for rows, columns in grids)]
    got = patches_of_pictures(run.cuda(), grids, mean.cuda(), inverse_std.cuda(), 14, dtype, **order)
    assert torch.equal(got.cpu(), patches_of_pictures(run, grids, mean, inverse_std, 14, dtype, **order))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("rows", "width", "replaced"), [(8192, 4096, 5000), (2049, 640, 2049), (70001, 40, 1), (33, 7, 0)])
def test_features_take_their_rows_without_a_sync(rows: int, width: int, replaced: int, dtype: torch.dtype, frozen: bool) -> None:
    """The bits of torch's indexing, forward and backward, by the kernels and (fp64) by torch; the host never waits for the device."""
    x, features, upstream = (normal(number, 1, width).to(dtype) for number in (rows, replaced, rows))
    positions = torch.randperm(rows, generator=torch.Generator().manual_seed(1))[:replaced].sort().values.cuda()
    tensors = [x.requires_grad_(not frozen), features.requires_grad_(), positions]
    want = forward_and_gradients(scatter_features_reference, tensors, upstream)
    forward_and_gradients(scatter_features, tensors, upstream)  # Triton compiles at the first call
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = forward_and_gradients(scatter_features, tensors, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
