"""Every op of megavlm_kernels: time beside plain torch, share of the measured ceiling, error against fp64 (forward, then gradients).

Shapes are those of Qwen3-8B on a pack of 8192 tokens. `of_ceiling` is the share of the matrix rate that the op's FLOPs reach, or of the
copy's bandwidth that its bytes do, each tensor that must be read or written counted once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from gpu.basics import milliseconds
from gpu.runner import ROOT, Place, Task, Unavailable

OPS = ROOT / "kernels" / "megavlm_kernels"
Run = Callable[[], list[Any]]


@dataclass
class Row:
    """One op on one shape. Each function gives [result, gradients]."""

    shape: str
    path: str
    """triton, torch, or the backend."""
    ours: Run
    plain: Run
    plain_is: str
    truth: Run
    """In fp64; of `small` where that is given."""
    ceiling: str
    """Task of the section ceilings that the op is held against."""
    work: float
    """FLOPs, or bytes where the ceiling is the copy."""
    small: tuple[Run, Run] | None = None
    """Ours and plain at a size whose fp64 fits, for the error."""


def tasks(section: str, place: Place) -> dict[str, Task]:
    from megavlm_kernels.packed_attention import BACKENDS

    made: dict[str, Callable[[], list[Row]]] = {}
    for op in op_names():
        if op == "packed_attention":
            made |= {f"{op} {backend}": partial(attention, backend, place) for backend in BACKENDS}
        elif op == "context_attention":
            made[op] = context_attention
        else:
            made[op] = partial(OWN.get(op, partial(element_wise, op)), place)
    return {name: partial(measure, rows, place) for name, rows in made.items()}


def op_names() -> list[str]:
    """Folders that hold an op."""
    return sorted(path.parent.name for path in OPS.glob("*/op.py"))


def measure(make: Callable[[], list[Row]], place: Place) -> dict[str, Any]:
    return {"rows": [_measure(row, place) for row in make()]}


def _measure(row: Row, place: Place) -> dict[str, Any]:
    ours, plain = row.small or (row.ours, row.plain)
    exact = row.truth()
    errors = {"error": _errors(ours(), exact), f"error_of_{row.plain_is}": _errors(plain(), exact)}
    del exact
    ms, plain_ms = (milliseconds(side, place.device, rounds=10) for side in (row.ours, row.plain))
    unit = "bytes_per_s" if row.ceiling == "copy" else "tflops"
    ceiling = place.fact("ceilings", row.ceiling, unit)
    rate = row.work / ms * 1e3 / (1 if unit == "bytes_per_s" else 1e12)
    return {
        "shape": row.shape,
        "path": row.path,
        "ms": ms,
        f"ms_of_{row.plain_is}": plain_ms,
        "times_faster": plain_ms / ms,
        unit: rate,
        "ceiling": row.ceiling,
        "of_ceiling": None if ceiling is None else rate / ceiling,
        **errors,
    }


def _errors(got: list[Any], exact: list[Any]) -> list[float]:
    """|x - truth| / |truth| of each; whatever is no number here is none in the report either."""
    errors = [float((a.double() - b).norm() / b.norm().clamp(min=1e-30)) for a, b in zip(got, exact, strict=True)]
    if not all(error < 0.2 for error in errors):
        raise RuntimeError(f"something else is computed: relative errors {errors}")
    return errors


def _forward_backward(function: Callable[..., Any], inputs: list[Any], upstream: Any) -> list[Any]:
    import torch

    out = function(*inputs)
    wanted = [x for x in inputs if isinstance(x, torch.Tensor) and x.requires_grad]
    gradients = torch.autograd.grad(out, wanted, upstream.to(out.dtype)) if wanted else ()
    return [out.detach(), *gradients]


def _double(inputs: list[Any]) -> list[Any]:
    import torch

    floats = lambda x: isinstance(x, torch.Tensor) and x.is_floating_point()  # noqa: E731
    return [x.detach().double().requires_grad_(x.requires_grad) if floats(x) else x for x in inputs]


def element_wise(op: str, place: Place) -> list[Row]:
    """Ops that benchmarks/kernels.py has cases of."""
    import torch

    from kernels import cases
    from megavlm_kernels.backend import uses_triton

    mine = [case for case in cases(torch.bfloat16, place.device, place.tiny) if case.op.split()[0] == op]
    if not mine:
        raise RuntimeError(f"benchmarks/kernels.py has no case of {op}")
    rows = []
    for case in mine:
        upstream = torch.randn_like(case.ours(*case.inputs).detach().float()).to(torch.bfloat16)
        # Patches take their format as an argument.
        wide = {"dtype": torch.float64} if "dtype" in getattr(case.eager, "keywords", {}) else {}
        rows.append(
            Row(
                shape=f"{case.op} " + "x".join(map(str, case.shape)),
                path="triton" if uses_triton(case.inputs[0]) else "torch",
                ours=partial(_forward_backward, case.ours, case.inputs, upstream),
                plain=partial(_forward_backward, case.eager, case.inputs, upstream),
                plain_is="torch",
                truth=partial(_forward_backward, partial(case.eager, **wide), _double(case.inputs), upstream),
                ceiling="copy",
                work=case.bytes_moved,
            )
        )
    return rows


def attention(backend: str, place: Place) -> list[Row]:
    """Causal attention inside 8 segments of a pack, 32 query and 8 key/value heads of 128, by one backend."""
    import torch
    from attention import dense, forward_backward, make_inputs, packed

    from megavlm_kernels.packed_attention import Call, Segments, choose, machine_of
    from megavlm_kernels.packed_attention.reference import packed_attention_reference

    tokens, heads, groups, width = (256, 4, 2, 16) if place.tiny else (8192, 32, 8, 128)
    reason = choose(Call("bf16", width), machine_of(place.device)).refused.get(backend)
    if reason is not None:
        raise Unavailable(reason)
    lengths, few = [tokens // 8] * 8, [tokens // 32] * 8
    inputs = make_inputs(tokens, heads, groups, width, torch.bfloat16, place.device)
    short = make_inputs(tokens // 4, heads, groups, width, torch.bfloat16, place.device)
    upstream, shorter = torch.ones_like(inputs[0]), torch.ones_like(short[0])

    def truth() -> list[Any]:
        attend = partial(packed_attention_reference, segments=Segments.of(few), causal=True)
        return forward_backward(attend, tuple(_double(list(short))), shorter.double())

    ours, plain = packed(lengths, backend), dense(lengths, place.device)
    small = packed(few, backend), dense(few, place.device)
    return [
        Row(
            shape=f"{tokens} tokens in 8 segments, {heads} heads of {width}, {groups} key/value heads",
            path=backend,
            ours=partial(forward_backward, ours, inputs, upstream),
            plain=partial(forward_backward, plain, inputs, upstream),
            plain_is="dense_mask",
            truth=truth,
            ceiling="matmul bf16",
            # 4 FLOPs a pair and element forward, 10 backward; half of the pairs is seen.
            work=14 * sum(n * n for n in lengths) / 2 * heads * width,
            small=(partial(forward_backward, small[0], short, shorter), partial(forward_backward, small[1], short, shorter)),
        )
    ]


def context_attention() -> list[Row]:
    raise Unavailable("it passes keys between ranks, and here is one: tests/gpu/test_context_ranks_cuda.py runs it on two GPUs")


def fp8_cast(place: Place) -> list[Row]:
    """To e4m3 with the transposed matrix, one scale and a scale a row; the error is that of rounding to FP8."""
    import torch

    from megavlm_kernels.backend import uses_triton
    from megavlm_kernels.fp8_cast import E4M3, reference
    from megavlm_kernels.fp8_cast import fp8_cast as cast

    size = (64, 128) if place.tiny else (8192, 12288)
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(place.device, torch.bfloat16)

    def values(function: Callable[..., Any], by_row: bool) -> list[Any]:
        made = function(x, E4M3, by_row=by_row, transpose=True)
        return [made.data_PC.double() * made.scale.double(), made.data_CP.double() * made.scale_C.double()]

    rows = []
    for by_row in (False, True):
        kinds = [partial(function, x, E4M3, by_row=by_row, transpose=True) for function in (cast, reference.fp8_cast)]
        rows.append(
            Row(
                shape=f"{size[0]}x{size[1]}, " + ("a scale a row" if by_row else "one scale"),
                path="triton" if uses_triton(x) else "torch",
                ours=kinds[0],  # type: ignore[arg-type]
                plain=kinds[1],  # type: ignore[arg-type]
                plain_is="torch",
                truth=lambda: [x.double(), x.double().T],
                ceiling="copy",
                work=x.numel() * (2 + 2),  # bf16 read, two matrices of a byte an element written
                small=(partial(values, cast, by_row), partial(values, reference.fp8_cast, by_row)),
            )
        )
    return rows


def fp8_linear(place: Place) -> list[Row]:
    """Forward and backward, the weight cast in the pass; against torch's bf16 linear."""
    import torch
    import torch.nn.functional as F
    from fp8 import SHAPES, Layer

    if place.device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        raise Unavailable("no FP8 products before compute capability 8.9")
    rows = []
    for name, (tokens, inputs, outputs) in (SHAPES["tiny"] if place.tiny else {n: SHAPES["cuda"][n] for n in ("qkv", "fc1")}).items():
        layer = Layer((tokens, inputs, outputs), place.device)

        def truth(layer: Any = layer) -> list[Any]:
            return _forward_backward(F.linear, _double([layer.x, layer.weight]), layer.gradient)

        for side, ceiling in (("current", "matmul fp8 tensorwise"), ("rowwise", "matmul fp8 rowwise")):
            shape = f"{name} {tokens}x{inputs}x{outputs}, {side}"
            work = 6 * tokens * inputs * outputs
            ours, plain = partial(layer.run, side), partial(layer.run, "bf16")
            rows.append(Row(shape, "scaled_mm", ours, plain, "bf16", truth, ceiling, work))
    return rows


def linear_cross_entropy(place: Place) -> list[Row]:
    """The head on target rows, a fifth of a pack, against logits of the target rows and torch's cross_entropy."""
    import torch
    import torch.nn.functional as F
    from head import Problem

    from megavlm_kernels.backend import uses_triton

    shape = (64, 32, 256) if place.tiny else (8192, 4096, 151936)
    problem = Problem(shape, "bf16", place.device)

    def truth() -> list[Any]:
        hidden, weight = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
        loss = F.cross_entropy(hidden[problem.rows] @ weight.T, problem.target[problem.rows], reduction="sum")
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]

    targets = len(problem.rows)
    return [
        Row(
            shape=f"{targets} targets of {shape[0]}, width {shape[1]}, vocabulary {shape[2]}",
            path="triton" if uses_triton(problem.hidden) else "torch",
            ours=partial(problem.run, "target rows"),
            plain=partial(problem.run, "target logits"),
            plain_is="torch",
            truth=truth,
            ceiling="matmul bf16",
            work=6 * targets * shape[1] * shape[2],
        )
    ]


OWN: dict[str, Callable[[Place], list[Row]]] = {
    "fp8_cast": fp8_cast,
    "fp8_linear": fp8_linear,
    "linear_cross_entropy": linear_cross_entropy,
}
"""Ops that are more than one sweep over their inputs."""
