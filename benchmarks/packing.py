"""Pack fill and planning time: megavlm's streaming subset-sum packer against next-fit and offline best-fit-decreasing.

    python benchmarks/packing.py [--samples 20000] [--output benchmarks/results/packing.json]

CPU microseconds a sample on a busy 2-core box (the last run, with hardware and versions: results/packing.json): subset-sum 3-13
where lengths allow a full pack and up to 140 where they do not (it then looks through the whole window), next-fit 0.2-1.3,
best-fit-decreasing 1-18. Fill: subset-sum 100.0 % on llava, tiles and text at 4096 and 8192 tokens, with and without a tile budget;
next-fit 79-95 %; best-fit-decreasing, which sees the whole data set at once and forgets its order, 96.5-99.98 %.

Length mixes (tokens, tiles), seeded:
    llava     a picture of 576 tokens in nine of ten samples, log-normal text
    tiles     0-13 tiles of 256 tokens (InternVL's aspect-ratio grids), log-normal text
    text      log-normal text alone
    long      normal around 2600 tokens: at 4096 hardly two fit together, and no packer can fill (best-fit-decreasing cannot either)
Tile budget: 1.02 x the mean tiles of a full pack, which is the hard case for a second constraint.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megavlm.data.packing import Budget, Packer, Waiting
from megavlm.planner.balance import balance
from megavlm.planner.flops import FlopsModel
from megavlm.tracking.environment import environment_report

Sample = Waiting[int]
Packs = list[list[Sample]]
WINDOW = 256


def make_mix(name: str, count: int, longest: int) -> list[Sample]:
    """`count` samples of a named mix, none longer than `longest` tokens (longer ones are drawn again)."""
    rng = np.random.default_rng(20240501)

    def one() -> tuple[int, int]:
        if name == "llava":
            tiles = int(rng.random() < 0.9)
            return tiles * 576 + int(rng.lognormal(5, 0.9)) + 8, tiles
        if name == "tiles":
            tiles = int(rng.choice([0, 1, 3, 5, 7, 13], p=[0.15, 0.35, 0.15, 0.15, 0.1, 0.1]))
            return tiles * 256 + int(rng.lognormal(4.5, 0.8)) + 8, tiles
        if name == "text":
            return int(rng.lognormal(6, 1)) + 8, 0
        return int(rng.normal(2600, 900)), 3

    drawn = (one() for _ in itertools.count())
    fitting = ((length, tiles) for length, tiles in drawn if 1 <= length <= longest)
    return [Waiting(length, tiles, number) for number, (length, tiles) in zip(range(count), fitting, strict=False)]


def subset_sum(samples: list[Sample], budget: Budget) -> Packs:
    """The packer as training runs it; the packs that the window's rest would form are left out."""

    def stream() -> Iterator[list[Sample]]:
        source, packer = iter(samples), Packer[int](budget, WINDOW)
        while True:
            try:
                yield packer.next_pack(lambda: next(source))
            except StopIteration:
                return

    return list(stream())


def next_fit(samples: list[Sample], budget: Budget) -> Packs:
    """One open pack; a sample that does not fit closes it."""
    packs: Packs = [[]]
    length = tiles = 0
    for sample in samples:
        if length + sample.length > budget.length or (budget.patches is not None and tiles + sample.patches > budget.patches):
            packs.append([])
            length = tiles = 0
        packs[-1].append(sample)
        length, tiles = length + sample.length, tiles + sample.patches
    return packs[:-1]


def best_fit_decreasing(samples: list[Sample], budget: Budget) -> Packs:
    """Longest first into the fullest pack that has room; needs the whole data set at once and changes its order."""
    packs: Packs = []
    rooms: list[tuple[int, int]] = []
    tiles_left: list[int] = []
    for sample in sorted(samples, key=lambda s: -s.length):
        place = bisect.bisect_left(rooms, (sample.length, -1))
        while place < len(rooms) and tiles_left[rooms[place][1]] < sample.patches:
            place += 1
        if place == len(rooms):
            pack, room = len(packs), budget.length
            packs.append([])
            tiles_left.append(budget.patches if budget.patches is not None else sys.maxsize)
        else:
            room, pack = rooms.pop(place)
        packs[pack].append(sample)
        tiles_left[pack] -= sample.patches
        bisect.insort(rooms, (room - sample.length, pack))
    return packs


PACKERS: dict[str, Callable[[list[Sample], Budget], Packs]] = {
    "megavlm subset-sum": subset_sum,
    "next-fit": next_fit,
    "best-fit-decreasing (offline)": best_fit_decreasing,
}


def oldest_wait(packs: Packs) -> int:
    """Samples that came after some sample and yet were packed before it, at most."""
    latest = worst = 0
    for pack in packs:
        latest = max(latest, *(sample.sample for sample in pack))
        worst = max(worst, latest - min(sample.sample for sample in pack))
    return worst


def measure_packing(count: int) -> list[dict[str, object]]:
    """Fill and time of every packer on every mix, with and without a tile budget."""
    rows: list[dict[str, object]] = []
    for mix, length in itertools.product(("llava", "tiles", "text", "long"), (4096, 8192)):
        samples = make_mix(mix, count, 4096)
        mean_tiles = length * sum(s.patches for s in samples) / sum(s.length for s in samples)
        most = max(s.patches for s in samples)
        for tiles in (None, max(int(np.ceil(1.02 * mean_tiles)), most)) if most else (None,):
            for name, packer in PACKERS.items():
                start = time.process_time()
                packs = packer(samples, Budget(length, tiles))
                elapsed = time.process_time() - start
                packed = sum(len(pack) for pack in packs)
                row = {
                    "mix": mix,
                    "seq_len_tokens": length,
                    "max_patches_per_pack": tiles,
                    "packer": name,
                    "fill_percent": round(100 * sum(s.length for pack in packs for s in pack) / (len(packs) * length), 3),
                    "us_per_sample": round(elapsed / packed * 1e6, 2),
                    "samples_per_pack": round(packed / len(packs), 2),
                    "oldest_wait_samples": oldest_wait(packs) if name != "best-fit-decreasing (offline)" else None,
                }
                rows.append(row)
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def measure_balance(dp_size: int = 64, num_microbatches: int = 8) -> dict[str, float]:
    """FLOPs of the busiest rank over the mean, packs dealt out in turn against `planner.balance`, over 20 steps."""
    from megavlm.config.schema import ModelConfig

    cost = FlopsModel(ModelConfig())
    packs = subset_sum(make_mix("tiles", 50000, 4096), Budget(4096))
    per_step = dp_size * num_microbatches
    in_turn, balanced, seconds = [], [], 0.0
    for step in range(20):
        chosen = packs[step * per_step : (step + 1) * per_step]
        flops = [
            float(cost.total([s.length for s in pack], sum(s.patches for s in pack), sum(s.length for s in pack) // 4)) for pack in chosen
        ]
        mean = sum(flops) / dp_size
        in_turn.append(max(sum(flops[rank::dp_size]) for rank in range(dp_size)) / mean)
        start = time.process_time()
        bins = balance(flops, dp_size)
        seconds += time.process_time() - start
        balanced.append(max(sum(flops[i] for i in items) for items in bins) / mean)
    result = {
        "dp_size": dp_size,
        "num_microbatches": num_microbatches,
        "imbalance_in_turn": round(float(np.mean(in_turn)), 5),
        "imbalance_balanced": round(float(np.mean(balanced)), 5),
        "ms_per_step": round(seconds / 20 * 1e3, 2),
    }
    print(result, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    arguments = parser.parse_args()
    report = {
        "command": f"python benchmarks/packing.py --samples {arguments.samples}",
        "window_samples": WINDOW,
        "packing": measure_packing(arguments.samples),
        "balance": measure_balance(),
        "environment": environment_report(),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
