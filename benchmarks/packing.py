"""Pack fill and packing time: megavlm's streaming subset-sum packer and the algorithms of its peers, on the same samples.

    python benchmarks/packing.py [--samples 20000] [--out benchmarks/results/packing.json]

CPU microseconds a sample on a busy 2-core box; the last run, with hardware and versions: results/packing.json.

Length mixes (tokens, patches), seeded; the shapes of facts that papers and data sets publish:
    llava     a picture of 576 tokens in nine of ten samples, log-normal text
    tiles     0-13 tiles of 256 tokens and 1024 patches (InternVL's aspect-ratio grids), log-normal text
    native    pictures of 4-3000 tokens, 4 patches each (Qwen2-VL), log-normal text
    text      log-normal text alone
    long      normal around 2600 tokens: at 4096 hardly two fit together, and no packer can fill
Patch budget: 1.02 x the mean patches of a full pack, rounded up to whole tiles where there are tiles; hard, and for megavlm also as a
target. Rounded down to whole tiles ("floor") it is the hardest that can be kept at all, where it is still above the mean.

Peers, written anew after their published algorithms, for lengths and patches alone (theirs also move tensors about):
    next-fit                one open pack; a sample that does not fit closes it
    first-fit (InternVL)    100 open packs, most tiles first; the first with room, else a new one; the one with most tiles leaves
                            when there are too many (internvl/train/dataset_packed.py; no overflow, which would cut samples)
    knapsack (energon)      a buffer of 1000 samples: the longest that fits, again and again, until none does, then the next pack
                            (the greedy knapsack of Megatron-LM's multimodal example, energon's packing buffer)
    balanced (nanoVLM)      a buffer of 128 packs' tokens: longest first into the emptiest pack with room, else a new one
    best-fit-decreasing     longest first into the fullest pack with room, over the whole data set at once: no stream, no order
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from math import gcd
from pathlib import Path

import numpy as np

from megavlm.data.packing import Budget, Packer, Waiting
from megavlm.tracking.environment import environment_report

Sample = Waiting[int]
Packs = list[list[Sample]]
WINDOW = 256
MIXES = ("llava", "tiles", "native", "text", "long")


def make_mix(name: str, count: int, longest: int, seed: int = 20240501) -> list[Sample]:
    """`count` samples of a named mix, none longer than `longest` tokens (longer ones are drawn again)."""
    rng = np.random.default_rng(seed)

    def one() -> tuple[int, int]:
        if name == "llava":
            pictures = int(rng.random() < 0.9)
            return pictures * 576 + int(rng.lognormal(5, 0.9)) + 8, pictures * 576
        if name == "tiles":
            tiles = int(rng.choice([0, 1, 3, 5, 7, 13], p=[0.15, 0.35, 0.15, 0.15, 0.1, 0.1]))
            return tiles * 256 + int(rng.lognormal(4.5, 0.8)) + 8, tiles * 1024
        if name == "native":
            tokens = int(rng.random() < 0.85) * int(np.clip(rng.lognormal(5.9, 0.7), 4, 3000))
            return tokens + int(rng.lognormal(4.5, 0.8)) + 8, tokens * 4
        if name == "text":
            return int(rng.lognormal(6, 1)) + 8, 0
        return int(rng.normal(2600, 900)), 3072

    drawn = (one() for _ in itertools.count())
    fitting = ((length, patches) for length, patches in drawn if 1 <= length <= longest)
    return [Waiting(length, patches, i, i) for i, (length, patches) in zip(range(count), fitting, strict=False)]


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


def _fits(budget: Budget, length: int, patches: int) -> bool:
    return length <= budget.length and (budget.patches is None or patches <= budget.patches)


def next_fit(samples: list[Sample], budget: Budget) -> Packs:
    """One open pack."""
    packs: Packs = [[]]
    length = patches = 0
    for sample in samples:
        if not _fits(budget, length + sample.length, patches + sample.patches):
            packs.append([])
            length = patches = 0
        packs[-1].append(sample)
        length, patches = length + sample.length, patches + sample.patches
    return packs[:-1]


def internvl_first_fit(samples: list[Sample], budget: Budget, max_open: int = 100) -> Packs:
    """Open packs sorted by patches, most first."""
    done: Packs = []
    # (-patches, number, length, pack), so that the list is sorted as tuples: most patches first, then the oldest.
    opened: list[tuple[int, int, int, list[Sample]]] = []
    for number, sample in enumerate(samples):
        patches, length, pack = sample.patches, sample.length, [sample]
        for place, (minus, _, total, there) in enumerate(opened):
            if _fits(budget, total + length, sample.patches - minus):
                del opened[place]
                patches, length, pack = sample.patches - minus, total + length, [*there, sample]
                break
        if length == budget.length:
            done.append(pack)
            continue
        bisect.insort(opened, (-patches, number, length, pack))
        if len(opened) > max_open:
            done.append(opened.pop(0)[3])
    return done


def energon_knapsack(samples: list[Sample], budget: Budget, buffer: int = 1000) -> Packs:
    """The longest that fits, again and again, of a buffer that is used up and filled again."""
    packs: Packs = []
    for chunk in _chunks(samples, buffer):
        left = sorted(chunk, key=lambda s: s.length)
        lengths = [s.length for s in left]
        while left:
            pack: list[Sample] = []
            length = patches = 0
            place = bisect.bisect_right(lengths, budget.length) - 1
            while place >= 0:
                if not _fits(budget, length + lengths[place], patches + left[place].patches):
                    place -= 1
                    continue
                length, patches = length + lengths[place], patches + left[place].patches
                pack.append(left.pop(place))
                del lengths[place]
                place = min(place, bisect.bisect_right(lengths, budget.length - length)) - 1
            packs.append(pack)
    return packs


def nanovlm_balanced(samples: list[Sample], budget: Budget, buffer_packs: int = 128) -> Packs:
    """Longest first into the emptiest pack, of a buffer of so many packs' tokens."""
    packs: Packs = []
    chunk: list[Sample] = []
    tokens = 0
    for sample in samples:
        chunk.append(sample)
        tokens += sample.length
        if tokens < buffer_packs * budget.length:
            continue
        open_packs: list[tuple[int, int, int, list[Sample]]] = [(0, i, 0, []) for i in range(-(-tokens // budget.length))]
        for item in sorted(chunk, key=lambda s: -s.length):
            for place, (length, number, patches, pack) in enumerate(open_packs):
                if _fits(budget, length + item.length, patches + item.patches):
                    del open_packs[place]
                    bisect.insort(open_packs, (length + item.length, number, patches + item.patches, [*pack, item]))
                    break
            else:
                bisect.insort(open_packs, (item.length, len(open_packs), item.patches, [item]))
        packs += [pack for _, _, _, pack in open_packs if pack]
        chunk, tokens = [], 0
    return packs


def best_fit_decreasing(samples: list[Sample], budget: Budget) -> Packs:
    """Longest first into the fullest pack that has room."""
    packs: Packs = []
    rooms: list[tuple[int, int]] = []
    left: list[int] = []
    for sample in sorted(samples, key=lambda s: -s.length):
        place = bisect.bisect_left(rooms, (sample.length, -1))
        while place < len(rooms) and left[rooms[place][1]] < sample.patches:
            place += 1
        if place == len(rooms):
            pack, room = len(packs), budget.length
            packs.append([])
            left.append(budget.patches if budget.patches is not None else sys.maxsize)
        else:
            room, pack = rooms.pop(place)
        packs[pack].append(sample)
        left[pack] -= sample.patches
        bisect.insort(rooms, (room - sample.length, pack))
    return packs


def _chunks(samples: list[Sample], size: int) -> Iterator[list[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


OURS = "megavlm subset-sum"
OFFLINE = "best-fit-decreasing (offline)"
PACKERS: dict[str, Callable[[list[Sample], Budget], Packs]] = {
    OURS: subset_sum,
    "next-fit": next_fit,
    "first-fit (InternVL)": internvl_first_fit,
    "knapsack (energon)": energon_knapsack,
    "balanced (nanoVLM)": nanovlm_balanced,
    OFFLINE: best_fit_decreasing,
}


def oldest_wait(packs: Packs) -> int:
    """Samples that came after some sample and yet were packed before it, at most."""
    latest = worst = 0
    for pack in packs:
        latest = max(latest, *(sample.sample for sample in pack))
        worst = max(worst, latest - min(sample.sample for sample in pack))
    return worst


def budgets(samples: list[Sample], length: int) -> dict[str, Budget]:
    """No budget on patches, and the ones of the docstring."""
    found = {"none": Budget(length)}
    if most := max(s.patches for s in samples):
        unit = gcd(*(s.patches for s in samples))
        cap = 1.02 * length * sum(s.patches for s in samples) / sum(s.length for s in samples)
        whole = max(int(np.ceil(cap / unit)) * unit, most)
        found |= {"hard": Budget(length, whole), "target": Budget(length, whole, patches_are_hard=False)}
        if (floor := int(cap) // unit * unit) >= max(most, cap / 1.02) and unit > 4:
            found["hard, floor"] = Budget(length, floor)
    return found


def measure(count: int) -> list[dict[str, object]]:
    """Fill and time of every packer on every mix, under every budget."""
    rows: list[dict[str, object]] = []
    for mix, length in itertools.product(MIXES, (4096, 8192)):
        samples = make_mix(mix, count, 4096)
        mean = length * sum(s.patches for s in samples) / sum(s.length for s in samples)
        for kind, budget in budgets(samples, length).items():
            for name, packer in PACKERS.items():
                if kind == "target" and name != OURS:
                    continue
                start = time.process_time()
                packs = packer(samples, budget)
                elapsed = time.process_time() - start
                packed = sum(len(pack) for pack in packs)
                patches = np.array([sum(s.patches for s in pack) for pack in packs])
                row = {
                    "mix": mix,
                    "seq_len_tokens": length,
                    "patch_budget": kind,
                    "patch_budget_over_mean": round(budget.patches / mean, 4) if budget.patches else None,
                    "packer": name,
                    "fill_percent": round(100 * sum(s.length for pack in packs for s in pack) / (len(packs) * length), 3),
                    "us_per_sample": round(elapsed / packed * 1e6, 2),
                    "samples_per_pack": round(packed / len(packs), 2),
                    "patches_std_over_mean": round(float(patches.std() / patches.mean()), 4) if patches.any() else None,
                    "most_patches_over_mean": round(float(patches.max() / mean), 4) if mean else None,
                    "oldest_wait_samples": oldest_wait(packs) if name != OFFLINE else None,
                }
                rows.append(row)
                print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "packing.json")
    arguments = parser.parse_args()
    report = {
        "command": f"python benchmarks/packing.py --samples {arguments.samples}",
        "window_samples": WINDOW,
        "packing": measure(arguments.samples),
        "environment": environment_report(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
