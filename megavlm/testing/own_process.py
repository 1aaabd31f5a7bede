"""Training in a process of its own, for tests on a GPU.

A process that has used the CPU backend redirects CUDA names and cannot use the GPU any more, and what one run leaves allocated would
count to the next.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megavlm.config.load import dump_recipe
from megavlm.config.schema import Recipe
from megavlm.tracking.metrics import read_metrics

_TRAIN = """
import sys, torch
from megavlm.config.load import load_recipe
from megavlm.testing.recipes import train_and_read
train_and_read(load_recipe(sys.argv[1]))
print("PEAK", torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0)
"""
_TOLD_CHARACTERS = 4000


@dataclass(frozen=True)
class OwnTraining:
    """What a run left."""

    records: list[dict[str, Any]]
    """Metrics, a record a step."""
    peak_bytes: int
    """Most that the GPU's allocator had given out; 0 on a CPU."""

    @property
    def losses(self) -> list[float]:
        return self.of("loss")

    def of(self, name: str) -> list[Any]:
        """One number of every step."""
        return [record[name] for record in self.records]


def train_apart(recipe: Recipe, timeout_s: float = 280.0) -> OwnTraining:
    """Train in a process of its own; the recipe is written beside the run's folder.

    Raises RuntimeError with the last of what a run that failed wrote, subprocess.TimeoutExpired where it does not end.
    """
    run = Path(recipe.run.dir)
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.parent / f"{run.name}.yaml"
    dump_recipe(recipe, file)
    output = run_python("-c", _TRAIN, str(file), timeout_s=timeout_s)
    peak = next(line for line in output.splitlines() if line.startswith("PEAK "))
    return OwnTraining(read_metrics(run), int(peak.split()[1]))


def run_python(*arguments: str, timeout_s: float = 280.0) -> str:
    """What a Python process that imports what this one can wrote to its standard output.

    Raises RuntimeError with the end of its standard error where it fails, subprocess.TimeoutExpired where it does not end.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=timeout_s)
    if done.returncode:
        raise RuntimeError(f"a process of its own ended with exit code {done.returncode}:\n{done.stderr[-_TOLD_CHARACTERS:]}")
    return done.stdout
