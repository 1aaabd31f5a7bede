"""Which backend attention takes, for machines and needs, and what it says of the others."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from megavlm_kernels.packed_attention.selection import BACKENDS, BackendError, Call, Machine, choose

PLAIN = Call("bf16", 128)
HOPPER = Machine("cuda", (9, 0), varlen=True, flash_attn_2=(2, 7, 4), flash_attn_3=True, transformer_engine=(2, 5))
AMPERE = replace(HOPPER, capability=(8, 0))
BARE = Machine("cuda", (9, 0), varlen=True)
CASES: list[tuple[str, Call, Machine, str]] = [
    ("all of it on Hopper", PLAIN, HOPPER, "flash_attn 3"),
    ("no FlashAttention 3", PLAIN, replace(HOPPER, flash_attn_3=False), "transformer_engine"),
    ("no Transformer Engine either", PLAIN, replace(HOPPER, flash_attn_3=False, transformer_engine=None), "flash_attn 2"),
    ("torch alone", PLAIN, BARE, "varlen"),
    ("an old torch alone", PLAIN, replace(BARE, varlen=False), "sdpa"),
    ("Ampere", PLAIN, AMPERE, "flash_attn 2"),
    ("Ampere with torch alone", PLAIN, replace(BARE, capability=(8, 6)), "varlen"),
    ("Ampere with version 3 only", PLAIN, replace(AMPERE, flash_attn_2=None), "varlen"),
    ("Turing", PLAIN, replace(HOPPER, capability=(7, 5)), "sdpa"),
    ("Blackwell", PLAIN, replace(HOPPER, capability=(10, 0)), "transformer_engine"),
    ("CPU", PLAIN, Machine("cpu", varlen=True), "sdpa"),
    ("fp16", Call("fp16", 64), HOPPER, "flash_attn 3"),
    ("fp32", Call("fp32", 64), HOPPER, "sdpa"),
    ("a window", Call("bf16", 128, window=True), replace(HOPPER, flash_attn_3=False), "transformer_engine"),
    ("a soft cap", Call("bf16", 256, softcap=True), HOPPER, "flash_attn 2"),
    ("a soft cap and an old flash-attn", Call("bf16", 128, softcap=True), replace(HOPPER, flash_attn_2=(2, 6, 3)), "sdpa"),
    ("a soft cap, Transformer Engine alone", Call("bf16", 128, softcap=True), replace(BARE, transformer_engine=(2, 5)), "sdpa"),
    ("masks", Call("bf16", 128, masked=True), HOPPER, "sdpa"),
    ("wide heads", Call("bf16", 264), HOPPER, "sdpa"),
]


@pytest.mark.parametrize(("call", "machine", "want"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_auto(call: Call, machine: Machine, want: str) -> None:
    choice = choose(call, machine)
    assert f"{choice.backend} {choice.flash_attn}" in (want, f"{want} 0")
    assert choice.backend not in choice.refused and "sdpa" not in choice.refused
    for backend in BACKENDS:
        if backend in choice.refused:
            with pytest.raises(BackendError) as error:
                choose(call, machine, backend)
            assert choice.refused[backend] in str(error.value) and "precision.attention" in str(error.value)
        else:
            assert choose(call, machine, backend).backend == backend


def test_reasons() -> None:
    assert choose(PLAIN, Machine("cpu")).refused == dict.fromkeys(BACKENDS[1:], "it needs a CUDA device")
    assert "no soft cap" in choose(Call("bf16", 64, softcap=True), HOPPER).refused["transformer_engine"]
    assert "2.7, this is 2.6.3" in choose(Call("bf16", 64, softcap=True), replace(HOPPER, flash_attn_2=(2, 6, 3))).refused["flash_attn"]
    assert "8.0, this GPU has 7.5" in choose(PLAIN, replace(HOPPER, capability=(7, 5))).refused["varlen"]
    assert "not 320" in choose(Call("bf16", 320), HOPPER).refused["flash_attn"]
    assert "does not load" in choose(PLAIN, BARE).refused["flash_attn"]
    with pytest.raises(BackendError, match="use auto, sdpa, varlen, flash_attn, transformer_engine"):
        choose(PLAIN, HOPPER, "flex")


def test_selection_needs_no_torch() -> None:
    code = "import sys; from megavlm_kernels.packed_attention.selection import choose; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode == 0
