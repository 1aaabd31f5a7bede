"""Time that ranks wait for each other, simulated: packs dealt out to ranks and microbatches in several ways.

    python benchmarks/balance.py [--steps 10] [--out benchmarks/results/balance.json]

A 300M encoder and an 8B language model, everything training; costs are the planner's FLOPs. 64 data-parallel ranks x 8 microbatches,
and the same packs as 8 x 64 and with two packs a microbatch. Idle is 1 - mean / longest:
    step        all ranks wait for the busiest at the end of the step
    microbatch  all ranks wait for the slowest at every microbatch (as ranks do that exchange something in each: tensor or context
                ranks with data of their own, experts)
    vision ...  the same of the encoder's FLOPs alone, which a first pipeline stage of its own would run
    pipeline    a rank's own 1F1B pipeline of 4 equal stages, against equal microbatches (negative: shorter than that)

Ways: in turn (the order of the stream, as every peer but the last does); LPT over ranks (longest processing time on the sums alone,
unordered within a rank: OrchMLLM, verl); megavlm.
"""

from __future__ import annotations

import argparse
import heapq
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from packing import OURS, PACKERS, Packs, make_mix

from megavlm.config.schema import ModelConfig
from megavlm.data.packing import Budget
from megavlm.planner.balance import deal
from megavlm.planner.flops import FlopsModel, VisionWork
from megavlm.planner.schedule import simulate
from megavlm.tracking.environment import environment_report

Dealt = list[list[list[int]]]
SEQ_LEN = 4096
MODEL = ModelConfig.model_validate(
    {
        "vision": {"image_size_px": 448, "hidden_size": 1024, "num_layers": 24, "ffn_hidden_size": 4096},
        "projector": {"pixel_shuffle": 2},
        "language": {"hidden_size": 4096, "num_layers": 32, "num_attention_heads": 32, "ffn_hidden_size": 14336, "vocab_size": 128256},
    }
)
TILE_PATCHES = {"llava": 576, "tiles": 1024}


def pack_costs(packs: Packs, mix: str) -> npt.NDArray[np.float64]:
    """(packs, 2): FLOPs of each pack, and of its encoder and projector. A quarter of the tokens are targets."""
    flops = FlopsModel(MODEL)
    rows = []
    for pack in packs:
        if mix == "native":
            work = VisionWork.of(s.patches for s in pack if s.patches)
        else:
            unit = TILE_PATCHES[mix]
            work = VisionWork.uniform(sum(s.patches for s in pack) // unit, unit)
        lengths = [s.length for s in pack]
        rows.append((flops.total(lengths, work, sum(lengths) // 4), flops.total((), work, 0)))
    return np.array(rows, dtype=np.float64)


def in_turn(costs: npt.NDArray[np.float64], ranks: int, microbatches: int) -> Dealt:
    """Pack i of the stream to rank i modulo ranks."""
    size = len(costs) // (ranks * microbatches)
    return [[list(range(r + m * size * ranks, r + (m + 1) * size * ranks, ranks)) for m in range(microbatches)] for r in range(ranks)]


def lpt(costs: npt.NDArray[np.float64], ranks: int, microbatches: int) -> Dealt:
    """The costliest pack left to the rank with the least so far; each rank's packs in the stream's order."""
    each = len(costs) // ranks
    heap, bins = [(0.0, r) for r in range(ranks)], [[] for _ in range(ranks)]  # type: ignore[var-annotated]
    for item in np.argsort(-costs[:, 0], kind="stable").tolist():
        load, rank = heapq.heappop(heap)
        bins[rank].append(item)
        if len(bins[rank]) < each:
            heapq.heappush(heap, (load + costs[item, 0], rank))
    size = each // microbatches
    return [[sorted(items)[m * size : (m + 1) * size] for m in range(microbatches)] for items in bins]


WAYS: dict[str, Callable[[npt.NDArray[np.float64], int, int], Dealt]] = {"in turn": in_turn, "LPT over ranks": lpt, "megavlm": deal}


def pipeline_excess(work: Sequence[float], stages: int = 4) -> float:
    """How much longer 1F1B takes than with equal microbatches; a third of the work is forward."""
    forward, backward = ([[share * w / stages for w in work]] * stages for share in (1 / 3, 2 / 3))
    equal = (len(work) + stages - 1) * sum(work) / len(work) / stages
    return simulate(forward, backward, pipeline=stages).step_time / equal - 1


def idle(work: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Of [rank, microbatch] costs: waiting at the end of the step, and at every microbatch; percent."""
    sums = work.sum(axis=1)
    return 100 * (1 - sums.mean() / sums.max()), 100 * (1 - sums.mean() / work.max(axis=0).sum())


def measure(steps: int) -> list[dict[str, object]]:
    """Every packing under every way of dealing."""
    rows: list[dict[str, object]] = []
    for mix in ("llava", "tiles", "native"):
        samples = make_mix(mix, 9 * 512 * steps, SEQ_LEN)
        mean_patches = SEQ_LEN * sum(s.patches for s in samples) / sum(s.length for s in samples)
        most = max(int(1.02 * mean_patches), max(s.patches for s in samples))
        packings = {
            "next-fit": (PACKERS["next-fit"], Budget(SEQ_LEN)),
            "megavlm": (PACKERS[OURS], Budget(SEQ_LEN)),
            "megavlm, patch target": (PACKERS[OURS], Budget(SEQ_LEN, most, patches_are_hard=False)),
        }
        for packing, (packer, budget) in packings.items():
            costs = pack_costs(packer(samples, budget)[: 512 * steps], mix)
            for ranks, microbatches in ((64, 8), (8, 64), (64, 4)):
                for way, dealing in WAYS.items():
                    found, excess, seconds = [], [], 0.0
                    for step in range(steps):
                        chosen = costs[step * 512 : (step + 1) * 512]
                        start = time.process_time()
                        dealt = dealing(chosen, ranks, microbatches)
                        seconds += time.process_time() - start
                        work = np.array([[chosen[items].sum(axis=0) for items in rank] for rank in dealt])
                        found.append([*idle(work[..., 0]), *idle(work[..., 1])])
                        excess += [100 * pipeline_excess(work[r, :, 0].tolist()) for r in range(0, ranks, 8)]
                    means = np.mean(found, axis=0)
                    row: dict[str, object] = {
                        "mix": mix,
                        "packing": packing,
                        "dp_size": ranks,
                        "num_microbatches": microbatches,
                        "micro_batch_packs": 512 // (ranks * microbatches),
                        "way": way,
                        "step_idle_percent": round(float(means[0]), 4),
                        "microbatch_idle_percent": round(float(means[1]), 3),
                        "vision_step_idle_percent": round(float(means[2]), 3),
                        "vision_microbatch_idle_percent": round(float(means[3]), 3),
                        "pipeline_excess_percent": round(float(np.mean(excess)), 3),
                        "ms_per_step": round(seconds / steps * 1e3, 1),
                    }
                    rows.append(row)
                    print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "balance.json")
    arguments = parser.parse_args()
    report = {
        "command": f"python benchmarks/balance.py --steps {arguments.steps}",
        "packs_per_step": 512,
        "seq_len_tokens": SEQ_LEN,
        "balance": measure(arguments.steps),
        "environment": environment_report(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
