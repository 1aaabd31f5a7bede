"""LM head and cross-entropy, forward and backward: target rows only, against all positions, and against Liger's fused kernel.

    python benchmarks/head.py [--rounds 5] [--threads 1] [--device cpu|cuda] [--out benchmarks/results/head.json]
    python benchmarks/head.py --tiny        (seconds; to see that it runs)

Of the pack's positions a fifth are targets. Sides:
    target rows     megavlm_kernels.linear_cross_entropy on the targets alone, as megavlm trains
    all rows        the same op on every position, with weight 0 where there is no target: what compacting the rows saves
    full logits     logits of every position in fp32 and torch's cross_entropy, which ignores positions without a target
    target logits   full logits of the target rows alone: what chunks and gradients computed ahead save, or cost
    liger           LigerFusedLinearCrossEntropyFunction on every position, as its users call it (ignore_index)
    liger rows      the same on target rows alone

Losses and gradients of all sides must agree, or it fails. `memory` is what a side adds to the peak of a process of its own (on a CPU its
resident set; on CUDA the allocator's peak). Liger's kernels are Triton's: without a GPU they run in Triton's interpreter only, whose time
says nothing. There its FLOPs (of matmuls, which torch counts) and the error of its gradients are compared at a small size, and no time is.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import take_turns, write_report
from torch.utils.flop_counter import FlopCounterMode

from megavlm.tracking.process_memory import ProcessMemory
from megavlm_kernels.linear_cross_entropy import linear_cross_entropy

TARGET_SHARE, IGNORED = 0.2, -100
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shape = tuple[int, int, int]
"""(positions, width, vocabulary)."""

# bf16 is small on a CPU: without instructions for it, a product takes some thirty times as long as in fp32.
CASES: dict[str, list[tuple[Shape, str]]] = {
    "cpu": [((2048, 640, 32000), "fp32"), ((1024, 896, 151936), "fp32"), ((256, 640, 8000), "bf16")],
    "cuda": [((8192, 4096, 151936), "bf16"), ((8192, 2048, 32000), "bf16")],
    "tiny": [((64, 32, 256), "fp32"), ((64, 32, 256), "bf16")],
}


class Problem:
    """One pack's hidden states, the head, and its targets."""

    def __init__(self, shape: Shape, dtype: str, device: str) -> None:
        positions, width, vocabulary = shape
        generator = torch.Generator().manual_seed(0)
        make = {"device": device, "dtype": DTYPES[dtype]}
        self.hidden = torch.randn(positions, width, generator=generator).to(**make).requires_grad_()
        self.weight = (torch.randn(vocabulary, width, generator=generator) * width**-0.5).to(**make).requires_grad_()
        self.rows = torch.randperm(positions, generator=generator)[: max(1, int(TARGET_SHARE * positions))].sort().values.to(device)
        self.target = torch.full((positions,), IGNORED)
        self.target[self.rows.cpu()] = torch.randint(0, vocabulary, (len(self.rows),), generator=generator)
        self.target = self.target.to(device)
        self.weights = (self.target != IGNORED).float()

    def run(self, side: str) -> list[torch.Tensor]:
        """[loss, gradients of hidden states and head]."""
        loss = SIDES[side](self)
        return [loss.detach(), *torch.autograd.grad(loss, (self.hidden, self.weight))]


def target_rows(p: Problem) -> torch.Tensor:
    return linear_cross_entropy(p.hidden[p.rows], p.weight, p.target[p.rows], p.weights[p.rows]).total


def all_rows(p: Problem) -> torch.Tensor:
    return linear_cross_entropy(p.hidden, p.weight, p.target.clamp(min=0), p.weights).total


def full_logits(p: Problem) -> torch.Tensor:
    return F.cross_entropy((p.hidden @ p.weight.T).float(), p.target, reduction="sum", ignore_index=IGNORED)


def target_logits(p: Problem) -> torch.Tensor:
    return F.cross_entropy((p.hidden[p.rows] @ p.weight.T).float(), p.target[p.rows], reduction="sum")


def _liger(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    found: Any = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target, None, None, IGNORED, 0.0, 0.0, "sum")
    loss: torch.Tensor = found[0] if isinstance(found, tuple) else found
    return loss


def liger(p: Problem) -> torch.Tensor:
    return _liger(p.hidden, p.weight, p.target)


def liger_rows(p: Problem) -> torch.Tensor:
    return _liger(p.hidden[p.rows], p.weight, p.target[p.rows])


OURS: dict[str, Callable[[Problem], torch.Tensor]] = {
    "target rows": target_rows,
    "all rows": all_rows,
    "full logits": full_logits,
    "target logits": target_logits,
}
LIGER: dict[str, Callable[[Problem], torch.Tensor]] = {"liger": liger, "liger rows": liger_rows}
SIDES = OURS | LIGER


def check(problem: Problem, sides: list[str]) -> None:
    want = problem.run("full logits")
    tolerance = 1e-4 if problem.hidden.dtype == torch.float32 else 3e-2
    for side in sides:
        for got, expected in zip(problem.run(side), want, strict=True):
            gap = float((got.float() - expected.float()).norm() / expected.float().norm())
            assert gap < tolerance, f"{side} computes something else: {gap}"


def memory_bytes(shape: Shape, dtype: str, side: str, device: str) -> int:
    """What one forward and backward adds to the peak. In a fresh process, so that nothing of others is in it."""
    problem = Problem(shape, dtype, device)
    if device == "cuda":
        problem.run(side)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        problem.run(side)
        return torch.cuda.max_memory_allocated() - before
    Problem((8, 8, 8), dtype, device).run(side)
    memory = ProcessMemory()
    problem.run(side)
    return memory.peak_bytes()


def measure(shape: Shape, dtype: str, rounds: int, device: str) -> dict[str, Any]:
    """Seconds, memory and FLOPs of all sides that run on the device."""
    sides = list(SIDES if device == "cuda" else OURS)
    memory = {}
    for name in sides:
        # Forked where that is possible: imports are paid for once. Nothing has run in this process yet that a child could reuse.
        with multiprocessing.get_context("spawn" if device == "cuda" else "fork").Pool(1) as process:
            memory[name] = process.apply(memory_bytes, (shape, dtype, name, device))
    problem = Problem(shape, dtype, device)
    check(problem, sides)
    best = {n: min(s) for n, s in take_turns({n: lambda n=n: problem.run(n) for n in sides}, rounds, device).items()}
    return {
        "shape": dict(zip(("positions", "width", "vocabulary"), shape, strict=True)),
        "targets": len(problem.rows),
        "dtype": dtype,
        "seconds": {name: round(s, 6) for name, s in best.items()},
        "times_target_rows": {name: round(s / best["target rows"], 2) for name, s in best.items()},
        "memory_mib": {name: round(m / 2**20, 1) for name, m in memory.items()},
        "matmul_gflops": {name: flops(problem, name) / 1e9 for name in sides},
    }


def flops(problem: Problem, side: str) -> int:
    with FlopCounterMode(display=False) as counter:
        problem.run(side)
    return int(counter.get_total_flops())


def liger_interpreted(dtype: str, queue: Any) -> None:
    """Liger's FLOPs and errors beside ours, where Triton interprets. Runs in a process that sets so before importing Triton."""
    torch.set_num_threads(1)
    shape = (160, 64, 512)
    problem = Problem(shape, dtype, "cpu")
    exact = Problem(shape, "fp32", "cpu")
    exact.hidden, exact.weight = (x.detach().double().requires_grad_() for x in (problem.hidden, problem.weight))
    loss = F.cross_entropy(exact.hidden @ exact.weight.T, exact.target, reduction="sum", ignore_index=IGNORED)
    truth = [loss.detach(), *torch.autograd.grad(loss, (exact.hidden, exact.weight))]
    found: dict[str, Any] = {"shape": shape, "dtype": dtype, "targets": len(problem.rows)}
    for side in ("target rows", *LIGER):
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(problem.run(side), truth, strict=True)]
        found[side] = {"matmul_flops": flops(problem, side), "relative_error": dict(zip(("loss", "hidden", "weight"), errors, strict=True))}
    queue.put(found)


def beside_liger_without_a_gpu() -> list[dict[str, Any]]:
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        found = []
        for dtype in DTYPES:
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=liger_interpreted, args=(dtype, queue))
            process.start()
            process.join()
            if process.exitcode:
                raise RuntimeError(f"Liger did not run in Triton's interpreter: exit code {process.exitcode}")
            found.append(queue.get())
        return found
    finally:
        del os.environ["TRITON_INTERPRET"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; idle ones of several spin, and their seconds count")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, rounds = arguments.device, 1 if arguments.tiny else arguments.rounds
    cases = CASES["tiny" if arguments.tiny else device]
    results = []
    for shape, dtype in cases:
        results.append(measure(shape, dtype, rounds, device))
        print(json.dumps({k: v for k, v in results[-1].items() if k not in ("seconds", "matmul_gflops")}), flush=True)
    report: dict[str, Any] = {"results": results}
    if device == "cpu":
        report["liger"] = {
            "time": "not measured: without a GPU its kernels run in Triton's interpreter only, whose time says nothing",
            "interpreted": beside_liger_without_a_gpu(),
        }
        print(json.dumps(report["liger"]), flush=True)
    write_report(arguments.out, device, report)


if __name__ == "__main__":
    main()
