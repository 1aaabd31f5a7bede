"""Every registered kernel compiles ahead of time for Hopper, without local memory and within shared memory; no GPU is needed."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from megavlm_kernels.testing.ahead_of_time import (
    SHARED_MEMORY_BYTES,
    Variant,
    compile_ahead,
    kernel_modules,
    kernels_of,
    registered_variants,
)

VARIANTS = [pytest.param(variant, id=f"{op}-{variant.name}") for op, variant in registered_variants()]


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiles_for_hopper(variant: Variant) -> None:
    takes = compile_ahead(variant)
    assert takes.stack_bytes == 0 and takes.local_bytes == 0, f"registers are spilled to memory: {takes}"
    assert takes.shared_bytes <= SHARED_MEMORY_BYTES, f"more shared memory than a block may have: {takes}"


@pytest.mark.parametrize("op", sorted(kernel_modules()))
def test_every_kernel_is_registered(op: str) -> None:
    module = kernel_modules()[op]
    registered = {variant.kernel.__name__ for variant in module.variants()}
    assert registered == {kernel.__name__ for kernel in kernels_of(module)}


@triton.jit
def _running_sum_kernel(x, y, BLOCK: tl.constexpr):
    tl.store(y + tl.arange(0, BLOCK), tl.cumsum(tl.load(x + tl.arange(0, BLOCK)), 0))


def test_spills_are_found() -> None:
    """More numbers in flight than a thread has registers."""
    takes = compile_ahead(Variant(_running_sum_kernel, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 32768}, {"num_warps": 1}))
    assert takes.stack_bytes > 0


def test_shared_memory_is_told() -> None:
    small = compile_ahead(Variant(_running_sum_kernel, {"x": "*fp32", "y": "*fp32"}, {"BLOCK": 1024}, {"num_warps": 4}))
    assert small.stack_bytes == 0 and small.registers > 0 and 0 < small.shared_bytes <= SHARED_MEMORY_BYTES


def test_an_argument_that_nobody_names() -> None:
    with pytest.raises(AssertionError, match="BLOCK"):
        compile_ahead(Variant(_running_sum_kernel, {"x": "*fp32", "y": "*fp32"}, {}))
