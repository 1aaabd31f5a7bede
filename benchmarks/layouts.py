"""Speed of two ranks against one, a core each, on the same global batches: what a layout costs.

    python benchmarks/layouts.py [--steps 6] [--rounds 1] [--out benchmarks/results/layouts.json]
    python benchmarks/layouts.py --tiny         (seconds; to see that it runs)

Every rank has one thread, so that two ranks have twice the arithmetic of one. Layouts take turns, and each one's best round counts: a busy
machine hurts all alike. Times are medians of whole training steps from metrics.jsonl (data, logging and the optimizer included), the first
two of a run left out. Goal: DP2 at least 1.8 times as fast as one rank.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from timing import write_report

from megavlm.config.schema import Recipe
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage, train_and_read
from megavlm.topology.table import text_table

WARM_UP_STEPS, GOAL = 2, 1.8
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one rank": (1, {}),
    "DP2": (2, {}),
    "DP2, ZeRO-1": (2, {"zero": 1}),
    "DP2, ZeRO-1, overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "DP2, ZeRO-3": (2, {"zero": 3}),
    "TP2": (2, {"tensor": 2}),
    "TP2, sequence": (2, {"tensor": 2, "sequence": True}),
    "TP2, pictures dealt": (2, {"tensor": 2, "encoder_data_parallel": True}),
    "CP2": (2, {"context": 2}),
    "PP2, even": (2, {"pipeline": 2}),
    "PP2, balanced": (2, {"pipeline": 2, "split": "balanced"}),
}
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vision": {"hidden_size": 32, "ffn_hidden_size": 64, "num_layers": 3},
        "language": {"num_layers": 4, "hidden_size": 48, "ffn_hidden_size": 96},
    },
    "30m": {
        "init_std": 0.02,
        "vision": {"hidden_size": 256, "ffn_hidden_size": 1024, "num_layers": 7},
        "language": {"num_layers": 8, "hidden_size": 512, "num_attention_heads": 8, "ffn_hidden_size": 1408, "vocab_size": 8192},
    },
}


def recipe_of(folder: Path, data: Path, size: str, parallel: dict[str, Any], steps: int) -> Recipe:
    """One stage in which everything trains."""
    stage = tiny_stage(steps=steps, packs_per_step=4) | {"mixture": {"pages": 0.4, "multi": 0.2, "text": 0.4}}
    seq_len = {"seq_len_tokens": 256 if size == "tiny" else 512}
    return tiny_recipe(folder, data, [stage], model=SIZES[size], parallel=parallel, data=seq_len)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS), help="one rank always runs")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "layouts.json")
    arguments = parser.parse_args()
    size = "tiny" if arguments.tiny else "30m"
    chosen = {name: LAYOUTS[name] for name in dict.fromkeys(["one rank", *arguments.layouts])}
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    losses: dict[str, float] = {}
    pool = RankPool(2)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = make_tiny_data(Path(folder) / "data")
            for turn in range(arguments.rounds):
                for name, (ranks, parallel) in chosen.items():
                    recipe = recipe_of(Path(folder) / f"{turn}-{name}", data, size, parallel, arguments.steps + WARM_UP_STEPS)
                    records = pool.run(train_and_read, recipe, world_size=ranks, timeout_s=600)[0]
                    seconds[name].append(statistics.median(r["step_time_s"] for r in records[WARM_UP_STEPS:]))
                    losses[name] = records[0]["loss"]
    finally:
        pool.close()
    best = {name: min(turns) for name, turns in seconds.items()}
    rows = [
        {"layout": name, "step_s": round(step, 4), "speed-up over one rank": round(best["one rank"] / step, 3), "first_loss": losses[name]}
        for name, step in best.items()
    ]
    print(text_table(tuple(rows[0]), [tuple(row.values()) for row in rows], f"{size} model, one thread a rank"))
    report = {"size": size, "model": SIZES[size], "layouts": rows, "rounds_s": seconds, "goal_of_DP2": GOAL}
    write_report(None if arguments.tiny else arguments.out, "cpu", report)


if __name__ == "__main__":
    main()
