"""How context ranks should share a pack: pads, balance and keys that travel, planned for large models, and measured on two gloo ranks.

    python benchmarks/context_split.py [--packs 200] [--repeats 5] [--out benchmarks/results/context_split.json]
    python benchmarks/context_split.py --tiny        (seconds; to see that it runs)

Mixes of samples are those of benchmarks/packing.py; `documents` has one sample of half to nine tenths of the pack, and texts around it.
Packs come from the packer that training uses. Splits are those of parallel.context_split.

Planned, for an 8B LLM's layers (the planner's FLOPs, everything training):
    pads         rows that ranks compute and that belong to no sample, over the rows that do, percent
    attention    query-key pairs of the busiest rank over the mean, averaged over packs
    llm          the same of the LLM's FLOPs; every pack waits for its busiest rank
    travelling   rows of keys and values that are sent, over those of an all-gather, percent
    step         time of a pack's LLM over that of even work without pads and without communication: FLOPs at --tflops, keys and values
                 (and gradients back) at --gbytes, not overlapped (the way `keys`; a ring hides part of it)

Measured: seconds of one layer's attention, forward and backward, with the exchange; the slower of two ranks. `gathered` is the way before
this one: all keys and values of the pack to every rank by all-gather, and reduce-scatter back.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import torch.distributed as dist
from balance import MODEL
from packing import OURS, PACKERS, make_mix

from megavlm.config.parallel import ContextSplit
from megavlm.config.schema import ParallelConfig
from megavlm.data.packing import Budget
from megavlm.models.layers.attention import attend_packed
from megavlm.models.layers.context import ContextPart
from megavlm.models.layers.packing import pack
from megavlm.planner.context import split_cost
from megavlm.planner.flops import FlopsModel, VisionWork
from megavlm.testing.pool import RankPool
from megavlm.topology.context import context_layout
from megavlm.tracking.environment import environment_report

LARGE = MODEL.model_copy(update={"language": MODEL.language.model_copy(update={"num_query_groups": 8})})
SPLITS: tuple[ContextSplit, ...] = get_args(ContextSplit)
MIXES = ("llava", "tiles", "native", "text", "documents")
Lengths = tuple[int, ...]


def packs_of(mix: str, seq_len: int, count: int) -> list[Lengths]:
    """Lengths of the segments of `count` packs, the padding at the end of each among them."""
    if mix == "documents":
        rng, found = np.random.default_rng(7), []
        for _ in range(count):
            lengths = [int(rng.uniform(0.5, 0.9) * seq_len)]
            while (rest := seq_len - sum(lengths)) > 0:
                lengths.append(min(int(rng.lognormal(6, 1)) + 8, rest))
            order = rng.permutation(len(lengths))
            found.append(tuple(lengths[i] for i in order))
        return found
    samples = make_mix(mix, 512 + count * max(seq_len // 150, 8), seq_len)  # the packer keeps a window of them back
    packs = PACKERS[OURS](samples, Budget(seq_len))[:count]
    lengths = [[sample.length for sample in one] for one in packs]
    return [tuple(one + ([seq_len - sum(one)] if sum(one) < seq_len else [])) for one in lengths]


def planned(mix: str, seq_len: int, ranks: int, packs: list[Lengths], flops_per_s: float, bytes_per_s: float) -> list[dict[str, Any]]:
    """One row a split."""
    rows, model = [], FlopsModel(LARGE)
    language = LARGE.language
    even = sum(model.total(lengths, VisionWork(), 0) for lengths in packs) / ranks
    for split in SPLITS:
        cost = split_cost(LARGE, None, packs, ParallelConfig(context=ranks, context_split=split))
        works = [context_layout(lengths, split, ranks).work() for lengths in packs]
        # Keys and values of a layer in bf16 go once forward, and their gradients once back; the busiest receiver is waited for.
        sent = sum(max(work.received) for work in works) * 2 * 2 * 2 * language.kv_heads * language.head_width * language.num_layers
        pads = cost.pads / cost.rows
        rows.append(
            {
                "mix": mix,
                "seq_len": seq_len,
                "ranks": ranks,
                "segments": round(sum(map(len, packs)) / len(packs), 1),
                "split": split,
                "pads_percent": round(100 * pads, 3),
                "attention": round(cost.attention, 4),
                "llm": round(cost.language, 4),
                "travelling_percent": round(100 * cost.travelling, 1),
                "step": round((even * cost.language * (1 + pads) / flops_per_s + sent / bytes_per_s) / (even / flops_per_s), 4),
            }
        )
    return rows


def attention_seconds(packs: list[Lengths], way: str, heads: int, width: int, repeats: int) -> list[float]:
    """Seconds on this rank of attention over each of `packs` in turn, forward and backward, once for each repeat."""
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    ranks, rank, cpu = dist.get_world_size(), dist.get_rank(), torch.device("cpu")
    group = dist.group.WORLD
    assert group is not None
    prepared = []
    for lengths in packs:
        layout = context_layout(lengths, "pack" if way == "gathered" else way, ranks)  # type: ignore[arg-type]
        packing = pack(lengths, cpu, causal=True, context=(layout, rank))
        parts = [ContextPart.of(layout, r, cpu) for r in range(ranks)]
        held = torch.cat([part.rows_L for part in parts])
        is_real = torch.cat([torch.ones(layout.num_rows, dtype=torch.bool) if p.is_pad_L is None else ~p.is_pad_L for p in parts])
        place_S = torch.empty(layout.total, dtype=torch.int64)
        place_S[held[is_real]] = torch.nonzero(is_real).squeeze(1)
        seen = torch.cat([torch.arange(first, first + number) for first, number in layout.keys(rank)])
        inputs = [torch.randn(layout.num_rows, heads // share, width, requires_grad=True) for share in (1, 4, 4)]
        prepared.append((packing, place_S[seen], inputs))
    found = []
    for _ in range(repeats + 1):
        dist.barrier()
        start = time.perf_counter()
        for packing, seen, (query, key, value) in prepared:
            part = packing.context
            assert part is not None
            if way == "gathered":
                k, v = (gather_from_sequence_parallel_region(x, group=group).index_select(0, seen) for x in (key, value))
            else:
                k, v = part.exchange.bring(key, value, group)
            out = attend_packed(part.without_pads(query), k, v, packing, causal=True, scale=width**-0.5)
            out.sum().backward()
        dist.barrier()
        found.append(time.perf_counter() - start)
    return found[1:]


def measured(seq_len: int, count: int, heads: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """Medians over repeats; ways take turns, so that a slow spell of the machine meets all of them."""
    pool, rows = RankPool(2), []
    try:
        for mix in MIXES:
            packs = packs_of(mix, seq_len, count)
            ways = (*SPLITS, "gathered")
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(repeats):
                for way in ways:
                    ranks = pool.run(attention_seconds, packs, way, heads, width, 1, world_size=2)
                    seconds[way].append(max(one[0] for one in ranks))
            rows += [{"mix": mix, "way": way, "seconds": round(statistics.median(values), 4)} for way, values in seconds.items()]
    finally:
        pool.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packs", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tflops", type=float, default=450.0, help="of a GPU, on the LLM's products")
    parser.add_argument("--gbytes", type=float, default=300.0, help="per second that a GPU receives (NVLink: 300-450, a 400 Gb/s NIC: 45)")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    count, repeats = (8, 1) if options.tiny else (options.packs, options.repeats)
    plan: list[dict[str, Any]] = []
    for seq_len, ranks in ((8192, 2), (8192, 4), (32768, 4), (32768, 8)):
        for mix in MIXES:
            plan += planned(mix, seq_len, ranks, packs_of(mix, seq_len, count), options.tflops * 1e12, options.gbytes * 1e9)
    for row in plan:
        print("  ".join(f"{value!s:>10}" for value in row.values()))
    times = measured(*((512, 2, 4, 32) if options.tiny else (4096, 2, 8, 64)), repeats)
    for row in times:
        print("  ".join(f"{value!s:>10}" for value in row.values()))
    report = {"tiny": options.tiny, "environment": environment_report(), "planned": plan, "measured": times}
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
