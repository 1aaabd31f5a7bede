"""How keys and values travel between context ranks: a pure function of what attention needs and what the machine has. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

from megavlm_kernels.packed_attention.selection import BackendError, Call, Machine, choose, unmet_need

Comm = Literal["keys", "p2p", "all_gather", "a2a"]
COMMS: tuple[Comm, ...] = get_args(Comm)
"""keys: every rank is sent the keys and values that its queries see, in one exchange before any kernel for packed sequences. The others are
Transformer Engine's: p2p passes keys and values around a ring while attention computes, all_gather collects them first, a2a exchanges
rows for heads."""

OLDEST: dict[str, tuple[int, ...]] = {"p2p": (2, 2), "all_gather": (2, 18), "a2a": (2, 10)}
"""Transformer Engine's first releases that take packed sequences (qkv_format="thd"), pads between them included, this way; read in
attention/dot_product_attention/context_parallel.py of the releases, and for `pad_between_seqs` in dot_product_attention.py."""


class CommError(BackendError):
    """Keys cannot travel the way that was asked for."""


@dataclass(frozen=True)
class SharedCall:
    """What attention over context ranks needs."""

    call: Call
    ranks: int
    heads: int
    """Query heads of one tensor rank."""
    key_heads: int
    split: str
    """parallel.context_split."""


@dataclass(frozen=True)
class CommChoice:
    """The way that was chosen, and why not the others."""

    comm: Comm
    refused: dict[str, str] = field(hash=False)


def unmet_comm(comm: str, shared: SharedCall) -> str | None:
    """Why no machine at all can bring keys this way; None when one can."""
    if comm == "keys":
        return None
    reason = unmet_need("transformer_engine", shared.call)
    if reason is not None:
        return f"it is Transformer Engine's, and {reason}"
    if shared.split != "zigzag":
        return f"it is Transformer Engine's, which wants parallel.context_split=zigzag, not {shared.split}"
    if comm == "p2p" and shared.call.window:
        return "the ring has no sliding window"
    if comm == "a2a" and (shared.heads % shared.ranks or shared.key_heads % shared.ranks):
        return (
            f"it deals heads to {shared.ranks} context ranks, which do not divide a tensor rank's {shared.heads} query heads and "
            f"{shared.key_heads} key heads"
        )
    return None


def choose_comm(shared: SharedCall, machine: Machine, forced: str = "auto", attention: str = "auto") -> CommChoice:
    """The way for a layer: with `forced` auto the ring where it can, else keys. `attention` is precision.attention.

    Raises:
        CommError: `forced` is unknown, or cannot be; says why, and what to set.
    """
    return _choose_comm(shared, machine, forced, attention)


@lru_cache(maxsize=256)
def _choose_comm(shared: SharedCall, machine: Machine, forced: str, attention: str) -> CommChoice:
    if forced not in (*COMMS, "auto"):
        raise CommError(f"parallel.context_comm={forced!r}: use auto, {', '.join(COMMS)}")
    refused: dict[str, str] = {}
    for comm in COMMS:
        reason = unmet_comm(comm, shared) or _missing(comm, shared, machine, attention)
        if reason is not None:
            refused[comm] = reason
    if forced != "auto":
        if forced in refused:
            raise CommError(f"parallel.context_comm={forced} cannot be: {refused[forced]}. Set it to auto or keys")
        return CommChoice(next(comm for comm in COMMS if comm == forced), refused)
    return CommChoice("p2p" if "p2p" not in refused else "keys", refused)


def _missing(comm: Comm, shared: SharedCall, machine: Machine, attention: str) -> str | None:
    """What of a way this machine, or the recipe's choice of kernels, lacks."""
    if comm == "keys":
        return None
    if attention not in ("auto", "transformer_engine"):
        return f"it is Transformer Engine's, and precision.attention={attention} asks for another kernel"
    reason = choose(shared.call, machine).refused.get("transformer_engine")
    if reason is not None:
        return f"it is Transformer Engine's: {reason}"
    assert machine.transformer_engine is not None
    if machine.transformer_engine < OLDEST[comm]:
        have, want = (".".join(map(str, version)) for version in (machine.transformer_engine, OLDEST[comm]))
        return f"packed sequences travel this way from Transformer Engine {want} on, and this is {have}"
    return None
