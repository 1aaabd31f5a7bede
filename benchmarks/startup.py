"""Seconds from `megavlm train` to the end of the first step, on the CPU, by phase; goal: under 15 s.

    python benchmarks/startup.py [--repeats 3] [--out benchmarks/results/startup.json]

A run on the demonstration data, whose index is there already, as of every start but the first. Each repeat is a fresh process, told apart
by what it does: the interpreter and the command line; imports of torch, megatron-core and the rest; process group; tokenizer and indexes;
model and optimizer; the first step's data; the first step; what else there is. The best repeat counts: others only make it slower.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from megavlm.config.load import dump_recipe
from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage
from megavlm.tracking.environment import environment_report

PHASES = {
    "process group": [("megavlm.training.run", "start_process_group"), ("megavlm.training.loop", "enter_grid")],
    "tokenizer and indexes": [("megavlm.training.run", "RunData"), ("megavlm.training.data:RunData", "open_stage")],
    "model and optimizer": [("megavlm.training.loop", "prepare_model")],
    "peak rate of the CPU": [("megavlm.training.loop", "Accountant")],
    "metrics and environment": [("megavlm.tracking.tracker:Tracker", "start")],
    "first step": [("megavlm.training.loop:_StageRun", "_one_step")],
}
"""Phase -> what it calls: (module or module:class, name)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--mlflow", action="store_true", help="with an MLflow store, as is the default of a recipe")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "startup.json")
    parser.add_argument("--child", nargs=2, metavar=("RECIPE", "OUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*arguments.child)
        return
    with tempfile.TemporaryDirectory() as folder:
        data = make_tiny_data(Path(folder) / "data")
        repeats = [measure(Path(folder), data, number, arguments.mlflow) for number in range(arguments.repeats + 1)][1:]
    best = min(repeats, key=lambda phases: phases["total"])
    for phase, seconds in best.items():
        print(f"{seconds:7.2f} s  {phase}")
    report = {"command": " ".join(["python", "benchmarks/startup.py", *sys.argv[1:]]), "best_s": best, "repeats_s": repeats}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**report, "environment": environment_report()}, indent=1) + "\n")


def measure(folder: Path, data: Path, number: int, mlflow: bool) -> dict[str, float]:
    """Seconds by phase of one fresh process; the first one of all builds the index."""
    recipe = tiny_recipe(folder / f"run-{number}", data, [tiny_stage(steps=1)], tracking={"mlflow": mlflow, "peak_tflops_per_rank": None})
    dump_recipe(recipe, folder / "recipe.yaml")
    out = folder / "phases.json"
    began = time.time()
    subprocess.run([sys.executable, __file__, "--child", str(folder / "recipe.yaml"), str(out)], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads(out.read_text())
    phases = {"interpreter and command line": found["began"] - began, **found["phases"]}
    phases["the rest"] = found["first_step_end"] - began - sum(phases.values())
    return {**phases, "total": found["first_step_end"] - began}


def child(recipe: str, out: str) -> None:
    """In a fresh process: train, and write down when what happened."""
    began = time.time()
    from megavlm.cli.main import main as command

    imports = time.time()
    import megavlm.training.run  # noqa: F401 - what `megavlm train` imports when it has read the recipe

    seconds: dict[str, float] = {"imports": time.time() - imports, **dict.fromkeys(PHASES, 0.0)}
    ends: list[float] = []
    for phase, calls in PHASES.items():
        for where, name in calls:
            _time(where, name, phase, seconds, ends)
    try:
        command(["train", recipe])
    except SystemExit as end:
        if end.code:
            raise
    Path(out).write_text(json.dumps({"began": began, "phases": seconds, "first_step_end": ends[0]}))


def _time(where: str, name: str, phase: str, seconds: dict[str, float], ends: list[float]) -> None:
    module, _, owner = where.partition(":")
    holder = sys.modules.get(module) or __import__(module, fromlist=["_"])
    holder = getattr(holder, owner) if owner else holder
    function = getattr(holder, name)

    def timed(*args: Any, **options: Any) -> Any:
        start = time.time()
        try:
            return function(*args, **options)
        finally:
            seconds[phase] += time.time() - start
            if phase == "first step":
                ends.append(time.time())

    setattr(holder, name, timed)


if __name__ == "__main__":
    main()
