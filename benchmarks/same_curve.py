"""The README's table: the quickstart's training in three layouts on two ranks, step by step the same losses.

    python benchmarks/same_curve.py [--data runs/quickstart-data] [--output benchmarks/results/same_curve.json]

Runs `megavlm train configs/recipes/quickstart.yaml` with its stages shortened, once a layout; makes the data first where they are missing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from megavlm.config import load_recipe
from megavlm.tracking.metrics import read_metrics

RECIPE = Path(__file__).parents[1] / "configs" / "recipes" / "quickstart.yaml"
STEPS = {"encoder": 20, "language": 10, "align": 5, "multitask": 10, "instruct": 5}
SCHEDULE = ("schedule.kind=cosine", "schedule.warmup_steps=2", "schedule.decay_steps=null")
LAYOUTS = {"data parallel": [], "parallel.tensor=2": ["parallel.tensor=2"], "parallel.pipeline=2": ["parallel.pipeline=2"]}
MEGAVLM = [str(Path(sys.executable).with_name("megavlm"))]


def train(layout: list[str], folder: Path, data: Path) -> list[dict[str, Any]]:
    """Metrics of one shortened run."""
    changes = [f"stages.{name}.{key}" for name, steps in STEPS.items() for key in (f"steps={steps}", *SCHEDULE)]
    sources = load_recipe(RECIPE, []).data.sources
    changes += [f"data.sources.{name}.path={data / Path(source.path).name}" for name, source in sources.items()]
    changes += [f"data.tokenizer={data / 'tokenizer.model'}", f"run.dir={folder}", "tracking.mlflow=false"]
    subprocess.run([*MEGAVLM, "train", str(RECIPE), *changes, *layout], check=True, stdout=subprocess.DEVNULL)
    return list(read_metrics(folder))


def largest(runs: dict[str, list[dict[str, Any]]], field: str) -> float:
    """Largest relative difference of any run's step to the first run's."""
    first, *others = runs.values()
    return max(abs(b[field] - a[field]) / abs(a[field]) for other in others for a, b in zip(first, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart-data"))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    subprocess.run([*MEGAVLM, "data", "make-quickstart", str(args.data)], check=True, stdout=subprocess.DEVNULL)
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: train(layout, Path(folder) / str(i), args.data.resolve()) for i, (name, layout) in enumerate(LAYOUTS.items())}
        environment = json.loads((Path(folder) / "0" / "environment.json").read_text())
    print("| loss at the end of | step | " + " | ".join(runs) + " |")
    ends = {record["stage"]: i for i, record in enumerate(next(iter(runs.values())))}
    for stage, place in ends.items():
        losses = " | ".join(f"{records[place]['loss']:.6f}" for records in runs.values())
        print(f"| {stage} | {place + 1} | {losses} |")
    differences = {field: largest(runs, field) for field in ("loss", "grad_norm")}
    print(", ".join(f"{field}: at most {value:.1e} apart, relative" for field, value in differences.items()))
    if args.output is not None:
        curves = {name: [{k: r[k] for k in ("step", "stage", "loss", "grad_norm")} for r in records] for name, records in runs.items()}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(
            json.dumps({"environment": environment, "largest_difference": differences, "curves": curves}, indent=1) + "\n"
        )
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
