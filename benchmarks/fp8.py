"""Linear layers in FP8 against bf16, forward and backward, and the fused cast with transposition against plain operations.

    python benchmarks/fp8.py [--rounds 10] [--threads 1] [--device cpu|cuda] [--out benchmarks/results/fp8.json]
    python benchmarks/fp8.py --tiny        (seconds; to see that it runs)

Sides of a layer:
    bf16          torch's linear
    current       megavlm_kernels.fp8_linear, one scale a tensor, weights cast in the pass
    current+held  the same with the weight cast before, as from the second microbatch of a step on
    rowwise       a scale for each row
Sides of a cast (to e4m3, with the transposed matrix):
    fused         megavlm_kernels.fp8_cast
    plain         maximum, division, cast, transposition: torch operations one after another
    copy          the matrix copied: the least that memory takes

`error` is the relative error of output and gradients against fp32. On a CPU FP8 products are emulated: times there only show that it runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import take_turns, write_report

from megavlm_kernels.fp8_cast import E4M3, Fp8Matrix, fp8_cast
from megavlm_kernels.fp8_cast import reference as plain_cast
from megavlm_kernels.fp8_linear import Fp8Format, cast_weight, fp8_linear

Shape = tuple[int, int, int]
"""(rows, inputs, outputs)."""
SHAPES: dict[str, dict[str, Shape]] = {
    # Qwen3-8B's layer (width 4096, 32 query and 8 key/value heads of 128, MLP 12288) on one pack of 8192 rows.
    "cuda": {"qkv": (8192, 4096, 6144), "output": (8192, 4096, 4096), "fc1": (8192, 4096, 24576), "fc2": (8192, 12288, 4096)},
    # Qwen2.5-0.5B's (896, 14 and 2 heads of 64, MLP 4864) on few rows: without instructions for bf16 the side to compare with is slow.
    "cpu": {"qkv": (128, 896, 1152), "output": (128, 896, 896), "fc1": (128, 896, 9728), "fc2": (128, 4864, 896)},
    "tiny": {"tiny": (100, 64, 96)},
}
FORMS = {"current": Fp8Format(), "current+held": Fp8Format(), "rowwise": Fp8Format(by_row=True)}


class Layer:
    """Inputs, weight and upstream gradient of one shape."""

    def __init__(self, shape: Shape, device: str) -> None:
        rows, inputs, outputs = shape
        generator = torch.Generator().manual_seed(0)
        make = {"device": device, "dtype": torch.bfloat16}
        self.x = torch.randn(rows, inputs, generator=generator).to(**make).requires_grad_()
        self.weight = (torch.randn(outputs, inputs, generator=generator) * inputs**-0.5).to(**make).requires_grad_()
        self.gradient = torch.randn(rows, outputs, generator=generator).to(**make)
        self.held: dict[str, Fp8Matrix] = {"current+held": cast_weight(self.weight, Fp8Format(), transpose=True)}

    def run(self, side: str) -> list[torch.Tensor]:
        """[output, gradients of input and weight]."""
        if side == "bf16":
            out = F.linear(self.x, self.weight)
        elif side == "fp32":
            x, weight = (t.detach().float().requires_grad_() for t in (self.x, self.weight))
            out = F.linear(x, weight)
            return [out, *torch.autograd.grad(out, (x, weight), self.gradient.float())]
        else:
            out = fp8_linear(self.x, self.weight, form=FORMS[side], cast=self.held.get(side))
        return [out, *torch.autograd.grad(out, (self.x, self.weight), self.gradient)]


def measure_layer(shape: Shape, rounds: int, device: str) -> dict[str, Any]:
    layer, sides = Layer(shape, device), ["bf16", *FORMS]
    exact = [t.detach() for t in layer.run("fp32")]
    errors = {
        side: [
            round(float((got.detach().float() - want).norm() / want.norm()), 4) for got, want in zip(layer.run(side), exact, strict=True)
        ]
        for side in sides
    }
    assert all(max(errors[side]) < 0.1 for side in sides), f"something else is computed: {errors}"
    del exact
    best = {name: min(s) for name, s in take_turns({n: lambda n=n: layer.run(n) for n in sides}, rounds, device).items()}
    rows, inputs, outputs = shape
    return {
        "shape": dict(zip(("rows", "inputs", "outputs"), shape, strict=True)),
        "seconds": {name: round(s, 7) for name, s in best.items()},
        "tflops": {name: round(6 * rows * inputs * outputs / s / 1e12, 2) for name, s in best.items()},
        "times_bf16": {name: round(best["bf16"] / s, 2) for name, s in best.items()},
        "error": errors,
    }


def measure_cast(shape: Shape, rounds: int, device: str) -> dict[str, Any]:
    x = torch.randn(shape[0], shape[1], generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    sides = {
        "fused": lambda: fp8_cast(x, E4M3, transpose=True),
        "fused by row": lambda: fp8_cast(x, E4M3, by_row=True, transpose=True),
        "plain": lambda: plain_cast.fp8_cast(x, E4M3, transpose=True),
        "plain by row": lambda: plain_cast.fp8_cast(x, E4M3, by_row=True, transpose=True),
        "copy": lambda: x.clone(),
    }
    best = {name: min(s) for name, s in take_turns(sides, rounds, device).items()}
    return {
        "shape": {"rows": shape[0], "columns": shape[1]},
        "seconds": {name: round(s, 7) for name, s in best.items()},
        "times_copy": {name: round(s / best["copy"], 2) for name, s in best.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes, rounds = (SHAPES["tiny"], 2) if args.tiny else (SHAPES[args.device], args.rounds)
    layers = {name: measure_layer(shape, rounds, args.device) for name, shape in shapes.items()}
    casts = {name: measure_cast(shape, rounds, args.device) for name, shape in shapes.items()}
    for name, found in layers.items():
        print(f"{name:8} " + "  ".join(f"{side} {times:.2f}x" for side, times in found["times_bf16"].items()))
    for name, found in casts.items():
        print(f"{name:8} " + "  ".join(f"{side} {times:.1f} copies" for side, times in found["times_copy"].items()))
    write_report(args.out, args.device, {"layers": layers, "casts": casts})


if __name__ == "__main__":
    main()
