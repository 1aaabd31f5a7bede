"""Which backend serves a call: a pure function of what the call needs and what the machine has. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, get_args

Backend = Literal["sdpa", "varlen", "flash_attn", "transformer_engine"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
"""sdpa: torch's scaled_dot_product_attention, a call a segment. varlen: torch.nn.attention.varlen. flash_attn: the package, version 3
where it is there and fits, else 2. transformer_engine: DotProductAttention with qkv_format="thd"."""

WIDEST_HEAD = 256
"""Of FlashAttention 2 and 3, and of cuDNN's fused attention with a backward pass."""
OLDEST_CAPABILITY = (8, 0)
"""FlashAttention 2 (and torch's copy of it) needs Ampere."""
HOPPER = (9, 0)
"""Transformer Engine's packed (THD) kernels are cuDNN's, from Hopper on; FlashAttention 3 is for Hopper alone."""
SOFTCAP_FLASH_ATTN_2 = (2, 7)
"""FlashAttention 2.6 brought the soft cap, releases after it its backward pass (Dao-AILab/flash-attention, pull request 1025)."""


class BackendError(ValueError):
    """The backend that was asked for cannot serve the call."""


@dataclass(frozen=True)
class Call:
    """What an attention call needs."""

    dtype: str
    """fp64, fp32, bf16 or fp16."""
    head_width: int
    window: bool = False
    """A causal sliding window."""
    softcap: bool = False
    masked: bool = False
    """Some rows see each other both ways, which causal order and windows do not say."""


@dataclass(frozen=True)
class Machine:
    """What is there to serve it."""

    device: str = "cpu"
    """cpu or cuda."""
    capability: tuple[int, int] | None = None
    """Compute capability of the GPU."""
    varlen: bool = False
    """torch has nn.attention.varlen (from 2.10 on)."""
    flash_attn_2: tuple[int, ...] | None = None
    """Version of flash_attn; None when it does not load."""
    flash_attn_3: bool = False
    """flash_attn_interface loads."""
    transformer_engine: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Choice:
    """The backend, and why not the others that rank before it or could have been asked for."""

    backend: Backend
    refused: dict[str, str] = field(hash=False)
    flash_attn: int = 0
    """2 or 3, with backend flash_attn."""


def unmet_need(backend: str, call: Call) -> str | None:
    """Why no machine at all can serve the call by `backend`; None when one can."""
    if backend == "sdpa":
        return None
    if call.dtype not in ("bf16", "fp16"):
        return f"its kernels compute in bf16 and fp16, not {call.dtype}"
    if call.head_width > WIDEST_HEAD:
        return f"its heads are at most {WIDEST_HEAD} wide, not {call.head_width}"
    if call.masked:
        return "its kernels take no mask, and rows that see each other both ways need one"
    if call.softcap and backend in ("varlen", "transformer_engine"):
        return "it has no soft cap on scores"
    return None


def choose(call: Call, machine: Machine, forced: str = "auto") -> Choice:
    """The backend for a call. With `forced` other than auto that one or an error.

    Of those that can: FlashAttention 3, Transformer Engine, FlashAttention 2, torch's varlen, SDPA. By speed where it was published:
    on an H100, causal, heads of 128, 8k tokens, forward / backward, FlashAttention 3 reaches 660 / 474 TFLOP/s, cuDNN (which Transformer
    Engine calls) 566 / 470, FlashAttention 2 (which torch's varlen is) 306 / 166 (Dao-AILab/flash-attention, pull request 1893).

    Raises:
        BackendError: `forced` is unknown or cannot serve the call; says why, and what to set.
    """
    return _choose(call, machine, forced)


@lru_cache(maxsize=256)
def _choose(call: Call, machine: Machine, forced: str) -> Choice:
    if forced not in (*BACKENDS, "auto"):
        raise BackendError(f"attention backend {forced!r}: use auto, {', '.join(BACKENDS)}")
    third = _without_flash_attn_3(call, machine)
    refused: dict[str, str] = {}
    for backend in BACKENDS:
        reason = unmet_need(backend, call) or _missing(backend, call, machine)
        if reason is not None:
            refused[backend] = reason
    version = 0 if "flash_attn" in refused else 2 if third else 3
    if forced != "auto":
        if forced in refused:
            raise BackendError(f"attention by {forced} cannot run here: {refused[forced]}. Set precision.attention to auto or sdpa")
        chosen: Backend = next(b for b in BACKENDS if b == forced)
    else:
        first: tuple[Backend, ...] = ("flash_attn",) if version == 3 else ()
        order: tuple[Backend, ...] = (*first, "transformer_engine", "flash_attn", "varlen", "sdpa")
        chosen = next(b for b in order if b not in refused)
    return Choice(chosen, refused, version if chosen == "flash_attn" else 0)


def _missing(backend: Backend, call: Call, machine: Machine) -> str | None:
    """What of `backend` this machine lacks."""
    if backend == "sdpa":
        return None
    if machine.device != "cuda" or machine.capability is None:
        return "it needs a CUDA device"
    if machine.capability < OLDEST_CAPABILITY:
        return f"it needs compute capability {_dots(OLDEST_CAPABILITY)}, this GPU has {_dots(machine.capability)}"
    if backend == "varlen":
        return None if machine.varlen else "this torch has no torch.nn.attention.varlen (it came with 2.10)"
    if backend == "transformer_engine":
        if machine.transformer_engine is None:
            return "Transformer Engine is not installed, or does not load"
        if machine.capability < HOPPER:
            return f"its packed kernels need compute capability {_dots(HOPPER)}, this GPU has {_dots(machine.capability)}"
        return None
    if machine.flash_attn_2 is None:
        return _without_flash_attn_3(call, machine)
    if call.softcap and machine.flash_attn_2 < SOFTCAP_FLASH_ATTN_2 and _without_flash_attn_3(call, machine):
        return f"a soft cap on scores needs flash-attn {_dots(SOFTCAP_FLASH_ATTN_2)}, this is {_dots(machine.flash_attn_2)}"
    return None


def _without_flash_attn_3(call: Call, machine: Machine) -> str | None:
    """Why version 3 cannot serve the call."""
    if not machine.flash_attn_3:
        return "flash-attn is not installed, or does not load"
    if machine.capability is None or machine.capability[0] != HOPPER[0]:
        return "flash-attn 3 is for Hopper GPUs, and flash-attn 2 is not installed"
    # Upstream has no test of the soft cap's gradient over packed segments; version 2 has.
    return "flash-attn 3 is not used with a soft cap on scores, and flash-attn 2 is not installed" if call.softcap else None


def _dots(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
