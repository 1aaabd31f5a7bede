"""megatron-core without Inductor, where there is no GPU: how it is imported, and that torch.compile is torch's again behind it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

SCRIPT = """
import sys
import torch
before = torch.compile
import megavlm
from megatron.core.transformer.transformer_layer import TransformerLayer
import megatron.core.fusions.fused_bias_swiglu as fused
assert torch.compile is before
assert not any(type(finder).__module__ == "megavlm.quick_import" for finder in sys.meta_path)
is_swiglu = torch.equal(fused.swiglu(torch.ones(2)), torch.nn.functional.silu(torch.ones(1)))
print("torch._inductor.compile_fx" in sys.modules, type(fused.swiglu).__name__, is_swiglu)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU megatron-core compiles its functions")
def test_no_inductor_without_a_gpu() -> None:
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["False", "function", "True"]
