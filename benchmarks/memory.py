"""The most memory that each rank took in training steps against the planner's estimate, in several layouts.

    python benchmarks/memory.py [--size small|tiny] [--device cpu|cuda] [--layouts one zero1 ...] [--out benchmarks/results/memory.json]

Each layout is a `megavlm train` of its own processes; what is read afterwards is the run's ranks.json, as of any run. On a GPU that counts
tensors. On a CPU it is the growth of the process, so two things are done here: the C library is told to give freed memory back at once
(MALLOC_MMAP_THRESHOLD_; slower, and left out with --slack to see what an ordinary run takes), and what data and Python take is measured
with a model of some ten thousand weights and stated beside (`process_bytes`). Layouts of more ranks than there are GPUs are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megavlm.config.load import dump_recipe
from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage
from megavlm.tracking.environment import environment_report
from megavlm.tracking.ranks import RANKS_FILE, size

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "recompute": (1, {"recompute": "full"}),
    "zero0": (2, {}),
    "zero1": (2, {"zero": 1}),
    "zero2": (2, {"zero": 2}),
    "zero3": (2, {"zero": 3}),
    "tensor2": (2, {"tensor": 2}),
    "sequence2": (2, {"tensor": 2, "sequence": True}),
    "context2": (2, {"context": 2}),
    "pipeline2": (2, {"pipeline": 2}),
}
"""Name -> (ranks, the recipe's block `parallel`)."""
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "vision": {"hidden_size": 256, "ffn_hidden_size": 1024, "num_layers": 4, "num_attention_heads": 4},
        "language": {
            "hidden_size": 512,
            "ffn_hidden_size": 1536,
            "num_layers": 8,
            "num_attention_heads": 8,
            "num_query_groups": 4,
            "vocab_size": 8192,
            "tie_embeddings": False,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--slack", action="store_true", help="on a CPU, with what the C library keeps of freed memory, as in any run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    arguments = parser.parse_args()
    layouts, left_out = _possible(arguments.layouts, arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        data = make_tiny_data(Path(folder) / "data")
        # The first run of all builds the index, which takes memory too.
        alone = [measure(Path(folder) / name, data, "one", arguments, size="tiny")[0] for name in ("index", "alone")][1]
        process = max(alone["peak_bytes"] - alone["estimated_bytes"]["total"], 0) if arguments.device == "cpu" else 0
        found = {name: summary(measure(Path(folder) / name, data, name, arguments), process) for name in layouts}
    for name, ranks in found.items():
        for rank in ranks:
            took, planned = size(rank["peak_bytes"]), size(rank["estimated_bytes"]["total"])
            print(f"{name:10s} rank {rank['rank']}  took {took:>9s}  estimated {planned:>9s}  {rank['tensors_over_estimate']:.2f}")
    report = {
        "command": " ".join(["python", "benchmarks/memory.py", *sys.argv[1:]]),
        "size": arguments.size,
        "dtype": arguments.dtype,
        "device": arguments.device,
        "process_bytes": process,
        "layouts": found,
        "left_out": left_out,
        "environment": environment_report(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _possible(names: list[str], device: str) -> tuple[list[str], dict[str, str]]:
    """(layouts that can run, why the others cannot)."""
    if device == "cpu":
        return names, {}
    import torch

    gpus = torch.cuda.device_count()
    too_many = {name: f"needs {LAYOUTS[name][0]} GPUs, there are {gpus}" for name in names if LAYOUTS[name][0] > gpus}
    return [name for name in names if name not in too_many], too_many


def measure(folder: Path, data: Path, layout: str, arguments: argparse.Namespace, size: str | None = None) -> list[dict[str, Any]]:
    """Train a few steps in processes of their own; what ranks.json says of each rank."""
    ranks, parallel = LAYOUTS[layout]
    recipe = tiny_recipe(
        folder,
        data,
        [tiny_stage(steps=arguments.steps)],
        run={"device": arguments.device},
        model={"init_std": 0.02, **SIZES[size or arguments.size]},
        parallel=parallel,
        precision={"dtype": arguments.dtype},
        data={"seq_len_tokens": arguments.tokens},
    )
    path = folder.with_suffix(".yaml")
    dump_recipe(recipe, path)
    environment = dict(os.environ)
    if arguments.device == "cpu" and not arguments.slack:
        environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    command = [sys.executable, "-m", "megavlm.cli", "train", str(path), "--nproc", str(ranks)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{layout}: {' '.join(command)} ended with {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads((folder / RANKS_FILE).read_text())["all"]
    return found


def summary(ranks: list[dict[str, Any]], process: int) -> list[dict[str, Any]]:
    """Each rank with the ratio that counts: what it took, less what data and Python take, over the estimate."""
    return [
        {
            **{k: v for k, v in rank.items() if k != "time_s"},
            "tensors_over_estimate": (rank["peak_bytes"] - process) / rank["estimated_bytes"]["total"],
        }
        for rank in ranks
    ]


if __name__ == "__main__":
    main()
