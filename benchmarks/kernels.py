"""Element-wise ops, forward and backward, beside eager torch: RMSNorm, gated linear unit, rotary positions, normalised patches, and visual
features among token embeddings.

    python benchmarks/kernels.py [--rounds 5] [--threads 1] [--device cpu|cuda] [--out benchmarks/results/kernels.json]
    python benchmarks/kernels.py --tiny        (seconds; to see that it runs)

Eager is what a model without these ops runs: torch's own norm, the formulas of the references. Results and gradients of the two must agree,
or it fails. `of_copy` is the share of a plain copy's bandwidth that ours reaches, counting each tensor that must be read or written once:
x, upstream gradient and both results. On a CPU, times are CPU seconds of the process.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import take_turns, write_report

from megavlm_kernels.backend import uses_triton
from megavlm_kernels.normalise_patchify import patches_of_tiles
from megavlm_kernels.normalise_patchify.reference import patches_reference
from megavlm_kernels.rms_norm import rms_norm
from megavlm_kernels.rms_norm.reference import rms_norm_reference
from megavlm_kernels.rotary import rotary
from megavlm_kernels.rotary.reference import rotary_reference
from megavlm_kernels.scatter_features import scatter_features
from megavlm_kernels.scatter_features.reference import scatter_features_reference
from megavlm_kernels.swiglu import gated_linear_unit
from megavlm_kernels.swiglu.reference import gated_linear_unit_reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHORTEST_S = 0.02
"""Calls are repeated until a measurement takes as long."""


@dataclass
class Case:
    """One op on one shape."""

    op: str
    shape: tuple[int, ...]
    ours: Callable[..., torch.Tensor]
    eager: Callable[..., torch.Tensor]
    inputs: list[torch.Tensor]
    bytes_moved: int
    """Forward and backward, each tensor once a direction."""


def cases(dtype: torch.dtype, device: str, tiny: bool) -> Iterator[Case]:
    """Shapes of a 100M-parameter model and of an 8B one, for a pack of 2048 tokens (8192 on CUDA)."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    rows = 64 if tiny else 8192 if device == "cuda" else 2048
    widths = [640] if tiny else [640, 4096]
    for width in widths:
        x, weight = normal(rows, width).requires_grad_(), normal(width).requires_grad_()
        moved = 5 * x.numel() * x.element_size()
        eager = partial(F.rms_norm, normalized_shape=(width,), eps=1e-5)
        yield Case("rms_norm", (rows, width), partial(rms_norm, eps=1e-5), lambda x, w, f=eager: f(x, weight=w), [x, weight], moved)
        zero = partial(rms_norm, eps=1e-5, zero_centered=True)
        yield Case("rms_norm 1+w", (rows, width), zero, partial(rms_norm_reference, eps=1e-5, zero_centered=True), [x, weight], moved)
    heads = normal(rows, 10, 64).requires_grad_(), normal(64).requires_grad_()
    head_norm = partial(F.rms_norm, normalized_shape=(64,), eps=1e-5)
    moved = 5 * heads[0].numel() * heads[0].element_size()
    yield Case("rms_norm", (rows, 10, 64), partial(rms_norm, eps=1e-5), lambda x, w: head_norm(x, weight=w), list(heads), moved)
    for width in [1728] if tiny else [1728, 12288]:
        x = normal(rows, 2 * width).requires_grad_()
        moved = 4 * x.numel() * x.element_size()
        eager_unit = partial(gated_linear_unit_reference, activation="silu")
        yield Case("swiglu", (rows, 2 * width), gated_linear_unit, eager_unit, [x], moved)
    for head_count, head_width, turned in [(10, 64, 64)] if tiny else [(10, 64, 64), (32, 128, 128), (16, 72, 36)]:
        x = normal(rows, head_count, head_width).requires_grad_()
        angle = torch.rand(rows, turned // 2, generator=generator).to(device).repeat(1, 2) * 100
        moved = 4 * x.numel() * x.element_size() + 2 * 2 * angle.numel() * 4
        yield Case("rotary", (rows, head_count, head_width, turned), rotary, rotary_reference, [x, angle.cos(), angle.sin()], moved)
    for tiles, side, patch in [(1, 112, 14)] if tiny else [(8, 224, 16), (16, 448, 14)]:
        pixels = torch.randint(0, 256, (tiles, 3, side, side), generator=generator, dtype=torch.uint8).to(device)
        settings: dict[str, Any] = {"patch_px": patch, "dtype": dtype}
        numbers = [torch.tensor([123.7, 116.3, 103.5], device=device), 1 / torch.tensor([58.4, 57.1, 57.4], device=device)]
        moved = pixels.numel() * (1 + torch.finfo(dtype).bits // 8)
        ours, eager_patches = partial(patches_of_tiles, **settings), partial(patches_reference, **settings)
        yield Case("normalise_patchify", (tiles, 3, side, patch), ours, eager_patches, [pixels, *numbers], moved)
    for width, replaced in [(640, rows // 2)] if tiny else [(640, rows // 8), (640, rows // 2), (4096, rows // 2)]:
        x, features = (normal(number, 1, width).requires_grad_() for number in (rows, replaced))
        # Pictures stand in the text as runs of tokens.
        start = torch.arange(replaced, device=device) // 16 * 16 * (rows // replaced)
        moved = 4 * x.numel() * x.element_size()
        tensors = [x, features, start + torch.arange(replaced, device=device) % 16]
        yield Case("scatter_features", (rows, replaced, width), scatter_features, scatter_features_reference, tensors, moved)


def run(function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], upstream: torch.Tensor) -> list[torch.Tensor]:
    """[result, gradients]."""
    out = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return [out, *torch.autograd.grad(out, wanted, upstream)] if wanted else [out]


def check(case: Case, upstream: torch.Tensor) -> None:
    """Fails where ours and eager torch differ by more than their format explains."""
    for ours, eager in zip(run(case.ours, case.inputs, upstream), run(case.eager, case.inputs, upstream), strict=True):
        scale = eager.abs().max().item()
        tolerance = (2e-2 if ours.dtype == torch.bfloat16 else 1e-4) * scale
        if not (ours - eager).abs().max().item() <= tolerance:
            raise SystemExit(f"{case.op} {case.shape} {ours.dtype}: ours and eager torch disagree")


def repeated(function: Callable[[], object], times: int) -> None:
    for _ in range(times):
        function()


def measure(case: Case, dtype: str, rounds: int, device: str, copy_rate: float) -> dict[str, Any]:
    """One row of the table."""
    with torch.no_grad():
        upstream = torch.randn_like(case.ours(*case.inputs).float()).to(DTYPES[dtype])
    check(case, upstream)
    sides = {name: partial(run, function, case.inputs, upstream) for name, function in (("ours", case.ours), ("eager", case.eager))}
    once = min(min(seconds) for seconds in take_turns(sides, 1, device).values())
    times = max(1, int(SHORTEST_S / max(once, 1e-6)))
    turns = take_turns({name: partial(repeated, side, times) for name, side in sides.items()}, rounds, device)
    best = {name: min(seconds) / times for name, seconds in turns.items()}
    return {
        "op": case.op,
        "shape": list(case.shape),
        "dtype": dtype,
        "path": "triton" if uses_triton(case.inputs[0]) else "torch",
        "ours_us": best["ours"] * 1e6,
        "eager_us": best["eager"] * 1e6,
        "times_faster": best["eager"] / best["ours"],
        "of_copy": case.bytes_moved / best["ours"] / copy_rate,
    }


def copy_bytes_per_s(device: str, tiny: bool, rounds: int) -> float:
    """Bytes read and written by a copy that no cache holds."""
    source = torch.ones((1 << 20) if tiny else (1 << 26), device=device)
    target = torch.empty_like(source)
    best = min(take_turns({"copy": partial(target.copy_, source)}, rounds, device)["copy"])
    return 2 * source.numel() * source.element_size() / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="one small shape an op; writes nothing unless --out is given")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    copy_rate = copy_bytes_per_s(arguments.device, arguments.tiny, arguments.rounds)
    rows = []
    for dtype in DTYPES:
        for case in cases(DTYPES[dtype], arguments.device, arguments.tiny):
            row = measure(case, dtype, arguments.rounds, arguments.device, copy_rate)
            rows.append(row)
            shape = "x".join(map(str, row["shape"]))
            sys.stdout.write(
                f"{row['op']:18} {shape:>16} {dtype} {row['path']:6} ours {row['ours_us']:10.1f} us  eager {row['eager_us']:10.1f} us  "
                f"{row['times_faster']:5.2f} x  {row['of_copy']:6.1%} of copy\n"
            )
            sys.stdout.flush()
    default = None if arguments.tiny else Path(__file__).parent / "results" / "kernels.json"
    write_report(arguments.out or default, arguments.device, {"copy_gb_per_s": copy_rate / 1e9, "ops": rows})


if __name__ == "__main__":
    main()
