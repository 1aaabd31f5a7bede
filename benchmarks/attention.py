"""Block-diagonal attention: time against the sum of squared segment lengths, and against a dense mask and a padded batch.

    python benchmarks/attention.py [--rounds 5] [--threads 1] [--device cpu|cuda] [--out benchmarks/results/attention.json]
    python benchmarks/attention.py --tiny        (seconds; to see that it runs)

Causal attention, forward and backward; on a CPU fp32 and bf16, on CUDA bf16 by every backend that is there.

    fit      the same number of tokens cut into segments of many kinds. Time = a + b x sum of squared lengths, by least squares; R2 is
             the share of the times' variance that the line explains
    ways     per segment (megavlm_kernels.packed_attention), the pack under one dense block-diagonal mask, and a batch padded to
             its longest segment under a padding mask; equal segments, and a long-tailed mix. Their results must agree, or it fails

CPU seconds of the process, on CUDA seconds between events; sides take turns, and each one's best round counts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timing import take_turns, write_report

from megavlm_kernels.packed_attention import BACKENDS, Call, Segments, choose, machine_of, packed_attention
from megavlm_kernels.packed_attention.reference import visible_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def mixes(tokens: int) -> dict[str, list[int]]:
    """`tokens` cut in many ways: equal parts, log-normal ones, and one long segment among short ones."""
    found = {f"{parts} equal": [tokens // parts] * parts for parts in (1, 2, 4, 8, 16, 32)}
    rng = np.random.default_rng(0)
    for sigma in (0.5, 1.0, 1.5):
        lengths: list[int] = []
        while sum(lengths) < tokens:
            lengths.append(int(np.clip(rng.lognormal(np.log(tokens / 24), sigma), 1, tokens - sum(lengths))))
        found[f"log-normal, sigma {sigma}"] = lengths
    for share in (0.25, 0.5, 0.75):
        long = int(tokens * share)
        short = [tokens // 32] * ((tokens - long) // (tokens // 32))
        found[f"one of {share:.0%}"] = [long, *short]
    return found


def make_inputs(tokens: int, heads: int, groups: int, width: int, dtype: torch.dtype, device: str) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(tokens, h, width, generator=generator).to(device, dtype).requires_grad_() for h in (heads, groups, groups)
    )
    return query, key, value


def forward_backward(attend: Callable[..., torch.Tensor], inputs: Inputs, upstream: torch.Tensor) -> list[torch.Tensor]:
    out = attend(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream)]


def fit(shape: dict[str, int], dtype: str, backend: str, rounds: int, device: str) -> dict[str, Any]:
    """The line through (sum of squared lengths, seconds)."""
    found = mixes(shape["tokens"])
    sides: dict[str, Callable[[], object]] = {}
    for name, lengths in found.items():
        inputs = make_inputs(sum(lengths), shape["heads"], shape["groups"], shape["width"], DTYPES[dtype], device)
        sides[name] = bound(packed(lengths, backend), inputs)
    best = {name: min(times) for name, times in take_turns(sides, rounds, device).items()}
    squares = np.array([sum(n * n for n in lengths) for lengths in found.values()], dtype=float)
    times = np.array(list(best.values()))
    slope, intercept = np.polyfit(squares, times, 1)
    left = times - (intercept + slope * squares)
    pairs = shape["heads"] * shape["width"] / 2  # causal: half of the pairs; 4 FLOPs a pair and element forward, 10 backward
    return {
        "dtype": dtype,
        "backend": backend,
        "seconds": {name: [int(s), round(t, 6)] for name, s, t in zip(best, squares, times, strict=True)},
        "seconds_per_squared_token": float(slope),
        "intercept_s": float(intercept),
        "r2": round(float(1 - (left**2).sum() / ((times - times.mean()) ** 2).sum()), 5),
        "gflops_of_the_slope": round(14 * pairs / float(slope) / 1e9, 1),
    }


def bound(attend: Callable[..., torch.Tensor], inputs: Inputs) -> Callable[[], object]:
    upstream = torch.ones_like(inputs[0])
    return lambda: forward_backward(attend, inputs, upstream)


def packed(lengths: Sequence[int], backend: str) -> Callable[..., torch.Tensor]:
    segments = Segments.of(lengths)
    return lambda q, k, v: packed_attention(q, k, v, segments, causal=True, backend=backend)


def dense(lengths: Sequence[int], device: str) -> Callable[..., torch.Tensor]:
    """The whole pack as one sequence; the mask is made once for all layers, as a trainer would."""
    rows = sum(lengths)
    mask = visible_rows(Segments.of(lengths), rows, rows, torch.device(device), causal=True)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return attend


def padded(lengths: Sequence[int], device: str) -> Callable[..., torch.Tensor]:
    """A batch padded on the right. The model around it would be padded too: only attention is counted here, in the batch's layout, with
    the rows taken out and put back inside."""
    longest, starts = max(lengths), list(accumulate(lengths, initial=0))
    row = torch.tensor([b * longest + i for b, n in enumerate(lengths) for i in range(n)], device=device)
    assert len(row) == starts[-1]
    seen = torch.arange(longest, device=device)[None] < torch.tensor(list(lengths), device=device)[:, None]
    causal = torch.ones(longest, longest, dtype=torch.bool, device=device).tril()
    mask = None if min(lengths) == longest else (seen[:, None, None, :] & causal)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch = [x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, row, x) for x in (q, k, v)]
        q, k, v = (x.unflatten(0, (len(lengths), longest)).transpose(1, 2) for x in batch)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)[row]

    return attend


def compare(shape: dict[str, int], mix: str, dtype: str, backend: str, rounds: int, device: str) -> dict[str, Any]:
    """The three ways on one mix."""
    lengths = mixes(shape["tokens"])[mix]
    inputs = make_inputs(sum(lengths), shape["heads"], shape["groups"], shape["width"], DTYPES[dtype], device)
    ways = {"per segment": packed(lengths, backend), "dense mask": dense(lengths, device), "padded batch": padded(lengths, device)}
    outs = {name: forward_backward(attend, inputs, torch.ones_like(inputs[0])) for name, attend in ways.items()}
    for name, results in outs.items():
        for ours, theirs in zip(outs["per segment"], results, strict=True):
            gap = (ours - theirs).float().norm() / theirs.float().norm()
            assert gap < (1e-4 if dtype == "fp32" else 5e-2), f"{name} computes something else: {gap}"
    best = {name: min(t) for name, t in take_turns({n: bound(a, inputs) for n, a in ways.items()}, rounds, device).items()}
    return {
        "mix": mix,
        "segments": len(lengths),
        "dtype": dtype,
        "backend": backend,
        "seconds": {name: round(s, 6) for name, s in best.items()},
        "times_per_segment": {name: round(s / best["per segment"], 2) for name, s in best.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of a CPU; idle ones of several spin, and their seconds count")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, help="of the pack: 4096, on CUDA 16384")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, rounds = arguments.device, 1 if arguments.tiny else arguments.rounds
    shape = {"tokens": 4096 if device == "cpu" else 16384, "heads": 8 if device == "cpu" else 32, "groups": 8, "width": 64}
    if device == "cuda":
        shape["width"] = 128
    shape["tokens"] = arguments.tokens or shape["tokens"]
    if arguments.tiny:
        shape |= {"tokens": 256, "heads": 2, "groups": 2, "width": 16}
    refused = choose(Call("bf16", shape["width"]), machine_of(device)).refused
    runs = [("fp32", "sdpa"), ("bf16", "sdpa")] if device == "cpu" else [("bf16", b) for b in BACKENDS if b not in refused]
    fits, ways = [], []
    for dtype, backend in runs:
        fits.append(fit(shape, dtype, backend, rounds, device))
        print(f"{dtype} {backend}: R2 {fits[-1]['r2']}, {fits[-1]['gflops_of_the_slope']} GFLOP/s", flush=True)
        for mix in ("16 equal", "log-normal, sigma 1.0"):
            ways.append(compare(shape, mix, dtype, backend, rounds, device))
            print(json.dumps({k: v for k, v in ways[-1].items() if k != "seconds"}), flush=True)
    write_report(arguments.out, device, {"shape": shape, "fit": fits, "ways": ways, "backends_not_here": refused})


if __name__ == "__main__":
    main()
