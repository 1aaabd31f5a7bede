"""Who waits for whom in the encoder, when several ranks share a microbatch: by the plan and its FLOPs, and measured on two gloo ranks.

    python benchmarks/vision_balance.py [--data runs/quickstart-data] [--steps 20] [--out benchmarks/results/vision_balance.json]
    python benchmarks/vision_balance.py --tiny        (seconds; to see that it runs)

Mixes:
    quickstart  microbatches of the quickstart's multitask stage: pages of one size, one to a dozen in a microbatch
    skewed      packs of 4096 tokens with pictures in their own size of 4 to 3000 tokens, four patches each (benchmarks/packing.py)

Ways to spread a microbatch's pictures over the ranks that share it (tensor x context):
    whole    every rank encodes all of them (encoder_tensor=1; without context ranks, tensor ranks could split the layers instead)
    in turn  picture i to rank i modulo ranks, with whole weights: no look at what a picture costs
    by cost  parallel.encoder_data_parallel=true

Planned: `time` is the busiest rank's FLOPs over all pictures' FLOPs / ranks, summed over microbatches (1 is perfect), `idle` the share
of all ranks' time in which they wait, and `wasted` that in which they wait or do what another rank does too.
Measured: seconds of encoder, projector and gathering, forward and backward, of the same skewed pictures at a quarter of their sides,
on an encoder of some 5M weights. `idle` is one minus the processes' CPU seconds over ranks x wall seconds: waiting for a message takes
none, so it says something on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from balance import MODEL as LARGE
from balance import SEQ_LEN
from packing import OURS, PACKERS, make_mix

from megavlm.config import load_recipe
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.demo import make_demo
from megavlm.data.index import build_index
from megavlm.data.packing import Budget
from megavlm.data.plan import StepPlanner
from megavlm.data.tokenizer import load_tokenizer
from megavlm.models.init import initialise
from megavlm.parallel.context import enter_grid
from megavlm.planner import pictures as planner
from megavlm.planner.pictures import PictureDeal, PictureDealer
from megavlm.testing.pool import RankPool
from megavlm.testing.tiny import tiny_chunks, tiny_native_batch
from megavlm.topology.table import text_table
from megavlm.tracking.environment import environment_report

RECIPE = Path(__file__).parents[1] / "configs" / "recipes" / "quickstart.yaml"
RANKS = (2, 4, 8)
Sizes = list[tuple[int, int]]
"""(rows, columns) of patches of the pictures of a microbatch."""
SMALL = {
    "vision": {
        "image_size_px": 14,
        "patch_size_px": 14,
        "num_layers": 6,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "ffn_hidden_size": 1024,
        "feature_layer": -1,
        "positions": "rotary",
        "class_token": False,
        "pre_norm": False,
    },
    "language": {"vocab_size": 512, "num_layers": 2, "hidden_size": 256, "num_attention_heads": 4, "ffn_hidden_size": 512},
}
WAYS: dict[str, dict[str, Any]] = {"whole": {}, "in turn": {"encoder_data_parallel": True}, "by cost": {"encoder_data_parallel": True}}


def in_turn(costs: Sequence[float], num_ranks: int) -> tuple[tuple[int, ...], ...]:
    """Picture i to rank i modulo ranks."""
    return tuple(tuple(range(rank, len(costs), num_ranks)) for rank in range(num_ranks))


def quickstart(data: Path, steps: int) -> tuple[ModelConfig, list[Sizes]]:
    """The quickstart's model, and the pictures of its multitask stage's microbatches."""
    recipe = load_recipe(RECIPE, [])
    stage = next(stage for stage in recipe.stages if stage.name == "multitask")
    tokenizer = load_tokenizer(str(data / "tokenizer.model"))
    sources = {n: s.model_copy(update={"path": str(data / Path(s.path).name)}) for n, s in recipe.data.sources.items()}
    indexes = {n: build_index(sources[n], recipe.data, recipe.model, "multimodal", tokenizer) for n in stage.mixture}
    microbatches = stage.packs_per_step // stage.micro_batch_packs
    plans = StepPlanner(indexes, stage, recipe.data, recipe.model, seed=1, dp_size=1, num_microbatches=microbatches)
    side, found = recipe.model.vision.grid_side, []
    for _ in range(steps):
        for microbatch in plans.next().assignment[0]:
            found.append([(side, side)] * sum(pack.num_tiles for pack in microbatch))
    return recipe.model, found


def skewed(count: int) -> list[Sizes]:
    """Packs of pictures in their own size, as square as their patches allow; blocks of 2 x 2 patches."""
    packs = PACKERS[OURS](make_mix("native", 60 * count, SEQ_LEN), Budget(SEQ_LEN, None))
    return [[_grid(sample.patches) for sample in pack if sample.patches] for pack in packs[:count]]


def _grid(patches: int) -> tuple[int, int]:
    rows = max(2 * round(patches**0.5 / 2), 2)
    return rows, max(2 * round(patches / rows / 2), 2)


def planned(model: ModelConfig, microbatches: Sequence[Sizes], native: bool) -> dict[str, dict[str, dict[str, float]]]:
    """Ranks -> way -> time, idle, wasted."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for ranks in RANKS:
        dealer = PictureDealer(model, ranks, 2)
        deals = [d for sizes in microbatches if sizes and (d := dealer.deal(len(sizes), sizes if native else None, None)) is not None]
        turns = [PictureDeal(d.pictures, d.flops, in_turn(d.flops, ranks)) for d in deals]
        work = sum(sum(d.loads) for d in deals)
        found[str(ranks)] = {"whole": {"time": float(ranks), "idle": 0.0, "wasted": 1 - 1 / ranks}}
        for way, dealt in (("in turn", turns), ("by cost", deals)):
            longest = sum(max(d.loads) for d in dealt)
            waits = 1 - work / (longest * ranks)
            found[str(ranks)][way] = {"time": longest * ranks / work, "idle": waits, "wasted": waits}
    return found


def encoder_seconds(layout: dict[str, Any], way: str, microbatches: Sequence[Sizes], repeats: int) -> list[tuple[float, float]]:
    """(wall, CPU) seconds of this rank for all microbatches, of each repeat."""
    parallel = ParallelConfig.model_validate(layout | WAYS[way] | ({"encoder_tensor": 1} if way == "whole" else {}))
    ctx = enter_grid(parallel, torch.device("cpu"), seed=1)
    model = ModelConfig.model_validate(SMALL)
    (chunk,) = tiny_chunks(model, ctx, parallel)
    initialise([chunk], model, 0, ctx)
    with patch.object(planner, "deal_pictures", in_turn if way == "in turn" else planner.deal_pictures):
        batches = [chunk.keep_own_pictures(_batch(model, sizes)) for sizes in microbatches]  # type: ignore[operator]
        return list(_timed(chunk, batches, repeats))


def _batch(model: ModelConfig, sizes: Sizes) -> Any:
    return tiny_native_batch(model, [sizes], text_tokens=(8,))


def _timed(chunk: Any, batches: Sequence[Any], repeats: int) -> Iterator[tuple[float, float]]:
    for repeat in range(repeats + 1):
        dist.barrier()
        wall, busy = time.perf_counter(), time.process_time()
        for batch in batches:
            # Text, too, but its embedding is next to nothing.
            chunk.merge(batch)[0].sum().backward()
            dist.barrier()
        if repeat:  # the first warms up
            yield time.perf_counter() - wall, time.process_time() - busy


def measured(microbatches: Sequence[Sizes], repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """Layout -> way -> median wall seconds, and idle share."""
    pool, found = RankPool(2), {}
    try:
        for name, layout in {"context 2": {"context": 2}, "tensor 2": {"tensor": 2}}.items():
            found[name] = {way: _summary(pool.run(encoder_seconds, layout, way, microbatches, repeats, world_size=2)) for way in WAYS}
    finally:
        pool.close()
    return found


def _summary(by_rank: Sequence[Sequence[tuple[float, float]]]) -> dict[str, float]:
    walls = [max(wall for wall, _ in repeat) for repeat in zip(*by_rank, strict=True)]
    busy = [sum(cpu for _, cpu in repeat) for repeat in zip(*by_rank, strict=True)]
    idle = [1 - b / (len(by_rank) * w) for b, w in zip(busy, walls, strict=True)]
    return {"seconds": statistics.median(walls), "idle": statistics.median(idle)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the quickstart's data; made anew, small, where none is given")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="two steps, one repeat")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    steps, repeats = (2, 1) if args.tiny else (args.steps, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        if args.data is None:
            make_demo(folder, seed=1, num_train=300, num_held_out=40, page_px=48, num_workers=1)
        model, pages = quickstart(args.data or Path(folder), steps)
    packs = skewed(4 * steps)
    result: dict[str, Any] = {
        "environment": environment_report(),
        "planned": {"quickstart": planned(model, pages, native=False), "skewed": planned(LARGE, packs, native=True)},
        "measured": measured([[_quarter(size) for size in sizes] for sizes in packs[:steps] if sizes], repeats),
    }
    rows = [
        (mix, ranks, way, f"{n['time']:.2f}", f"{100 * n['idle']:.1f} %", f"{100 * n['wasted']:.1f} %")
        for mix, by_ranks in result["planned"].items()
        for ranks, ways in by_ranks.items()
        for way, n in ways.items()
    ]
    print(text_table(("mix", "ranks", "pictures", "time", "idle", "wasted"), rows, "planned: the busiest rank's time, 1 is perfect") + "\n")
    timed = [(on, way, numbers) for on, ways in result["measured"].items() for way, numbers in ways.items()]
    seen = [(on, way, f"{n['seconds']:.3f}", f"{100 * n['idle']:.1f} %") for on, way, n in timed]
    print(text_table(("ranks", "pictures", "seconds", "idle"), seen, "measured on two gloo ranks: skewed, forward and backward"))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.out}")


def _quarter(size: tuple[int, int]) -> tuple[int, int]:
    rows, columns = (max(n // 4, 1) for n in size)
    return rows, columns


if __name__ == "__main__":
    main()
