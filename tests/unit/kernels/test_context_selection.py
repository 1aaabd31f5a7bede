"""How keys travel between context ranks, for machines and needs, and what is said of the other ways."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from megavlm_kernels.context_attention.selection import COMMS, CommError, SharedCall, choose_comm
from megavlm_kernels.packed_attention.selection import Call, Machine

PLAIN = SharedCall(Call("bf16", 128), 4, 32, 8, "zigzag")
HOPPER = Machine("cuda", (9, 0), varlen=True, flash_attn_2=(2, 7, 4), flash_attn_3=True, transformer_engine=(2, 18))
CASES: dict[str, tuple[SharedCall, Machine, str, set[str]]] = {
    # what is needed, machine, what auto takes, what else could be asked for
    "Hopper": (PLAIN, HOPPER, "p2p", {"keys", "all_gather", "a2a"}),
    "an older Transformer Engine": (PLAIN, replace(HOPPER, transformer_engine=(2, 8)), "p2p", {"keys"}),
    "in between": (PLAIN, replace(HOPPER, transformer_engine=(2, 10)), "p2p", {"keys", "a2a"}),
    "too old": (PLAIN, replace(HOPPER, transformer_engine=(2, 1)), "keys", set()),
    "none": (PLAIN, replace(HOPPER, transformer_engine=None), "keys", set()),
    "Ampere": (PLAIN, replace(HOPPER, capability=(8, 0)), "keys", set()),
    "CPU": (PLAIN, Machine("cpu"), "keys", set()),
    "fp32": (replace(PLAIN, call=Call("fp32", 128)), HOPPER, "keys", set()),
    "a window": (replace(PLAIN, call=Call("bf16", 128, window=True)), HOPPER, "keys", {"all_gather", "a2a"}),
    "a soft cap": (replace(PLAIN, call=Call("bf16", 128, softcap=True)), HOPPER, "keys", set()),
    "masks": (replace(PLAIN, call=Call("bf16", 128, masked=True)), HOPPER, "keys", set()),
    "few key heads": (replace(PLAIN, key_heads=2), HOPPER, "p2p", {"keys", "all_gather"}),
    "contiguous": (replace(PLAIN, split="contiguous"), HOPPER, "keys", set()),
    "pack": (replace(PLAIN, split="pack"), HOPPER, "keys", set()),
}


@pytest.mark.parametrize("case", CASES)
def test_choice(case: str) -> None:
    shared, machine, want, others = CASES[case]
    choice = choose_comm(shared, machine)
    assert choice.comm == want
    assert set(choice.refused) == set(COMMS) - others - {want}
    for comm in COMMS:
        if comm in choice.refused:
            with pytest.raises(CommError) as error:
                choose_comm(shared, machine, comm)
            assert f"parallel.context_comm={comm} cannot be: {choice.refused[comm]}. Set it to auto or keys" == str(error.value)
        else:
            assert choose_comm(shared, machine, comm).comm == comm


def test_reasons() -> None:
    refused = choose_comm(replace(PLAIN, key_heads=2), replace(HOPPER, transformer_engine=(2, 9, 1))).refused
    assert "4 context ranks, which do not divide a tensor rank's 32 query heads and 2 key heads" in refused["a2a"]
    assert "from Transformer Engine 2.18 on, and this is 2.9.1" in refused["all_gather"]
    assert "sliding window" in choose_comm(CASES["a window"][0], HOPPER).refused["p2p"]
    assert "it needs a CUDA device" in choose_comm(PLAIN, Machine("cpu")).refused["p2p"]


def test_another_kernel_of_the_recipe_is_respected() -> None:
    assert choose_comm(PLAIN, HOPPER, attention="transformer_engine").comm == "p2p"
    assert choose_comm(PLAIN, HOPPER, attention="flash_attn").comm == "keys"
    with pytest.raises(CommError, match=r"precision.attention=sdpa asks for another kernel"):
        choose_comm(PLAIN, HOPPER, "p2p", attention="sdpa")


def test_unknown_way() -> None:
    with pytest.raises(CommError, match="use auto, keys, p2p, all_gather, a2a"):
        choose_comm(PLAIN, HOPPER, "ring")


def test_selection_needs_no_torch() -> None:
    code = "import sys, megavlm_kernels.context_attention.selection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
