"""Share of a step outside the model's own work, in the real training loop on the CPU; goal: under 3 % for a model of 100M parameters.

    python benchmarks/step_overhead.py [--size 100m|tiny] [--steps 6] [--out benchmarks/results/step_overhead.json]

From the beginning of one step to that of the next: waiting for data, moving microbatches, Python between the model's parts, records
(metrics.jsonl, console, MLflow) and the timers themselves, against encoder, projector, LLM, head, backward passes and optimizer. Threads
that decode pictures beside the step take their time from the model's part and are not seen; on two cores that is the price of data.
Also: what the timers cost, by the stamps that a step takes and the seconds of one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from megavlm.testing.recipes import make_tiny_data, tiny_recipe, tiny_stage
from megavlm.tracking.environment import environment_report
from megavlm.tracking.metrics import read_metrics
from megavlm.tracking.timers import StepClock

MODEL_PARTS = ("encoder", "projector", "language", "head", "language_backward", "encoder_backward", "optimizer")
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "100m": {
        "vision": {"hidden_size": 384, "ffn_hidden_size": 1536, "num_layers": 6, "num_attention_heads": 6},
        "language": {
            "hidden_size": 768,
            "ffn_hidden_size": 2048,
            "num_layers": 12,
            "num_attention_heads": 12,
            "num_query_groups": 12,
            "vocab_size": 8192,
        },
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="100m")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "step_overhead.json")
    arguments = parser.parse_args()
    result = measure(arguments.size, arguments.steps, arguments.threads)
    print(json.dumps(result, indent=1))
    report = {"command": " ".join(["python", "benchmarks/step_overhead.py", *sys.argv[1:]]), **result, "environment": environment_report()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def measure(size: str, steps: int, threads: int) -> dict[str, Any]:
    """Train for `steps` + 1; the first warms up."""
    import torch

    from megavlm.training.run import train
    from megavlm.training.watch import StepWatch

    torch.set_num_threads(threads)
    os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29571"})
    begins, stamps = [], []
    begin_step, finish_step = StepWatch.begin_step, StepClock.finish_step

    def noting_begin(self: StepWatch, step: int) -> None:
        begins.append(time.perf_counter())
        begin_step(self, step)

    def noting_stamps(self: StepClock) -> dict[str, float]:
        stamps.append(len(self._marks) + 1)
        return finish_step(self)

    with tempfile.TemporaryDirectory() as folder:
        data = make_tiny_data(Path(folder) / "data")
        recipe = tiny_recipe(
            Path(folder) / "run",
            data,
            [tiny_stage(steps=steps + 2)],
            model={"init_std": 0.02, **SIZES[size]},
            data={"seq_len_tokens": 1024},
            tracking={"mlflow": True, "peak_tflops_per_rank": None},
        )
        with patch.object(StepWatch, "begin_step", noting_begin), patch.object(StepClock, "finish_step", noting_stamps):
            code = train(recipe)
        assert code == 0, f"training ended with exit code {code}"
        records = read_metrics(recipe.run.dir)[1:-1]
    walls = [end - begin for begin, end in itertools.pairwise(begins[1:])]
    outside = [1 - sum(r["time_s"][part] for part in MODEL_PARTS) / wall for r, wall in zip(records, walls, strict=True)]
    stamp_s = seconds_of_a_stamp()
    return {
        "size": size,
        "step_s": statistics.median(walls),
        "outside_model_share": statistics.median(outside),
        "outside_model_ms": {
            **{part: 1e3 * statistics.median(r["time_s"][part] for r in records) for part in ("data", "copy", "communication", "other")},
            "between steps": 1e3 * statistics.median(w - r["step_time_s"] for r, w in zip(records, walls, strict=True)),
        },
        "timers": {
            "stamps_a_step": statistics.median(stamps),
            "us_a_stamp": 1e6 * stamp_s,
            "share": statistics.median(stamps) * stamp_s / statistics.median(walls),
        },
        "parts_s": {part: statistics.median(r["time_s"][part] for r in records) for part in MODEL_PARTS},
    }


def seconds_of_a_stamp(number: int = 20_000) -> float:
    """What entering or leaving a part costs, with its share of adding up."""
    from megavlm.tracking.timers import part, use_clock

    clock = StepClock()
    use_clock(clock)
    try:
        start = time.perf_counter()
        clock.begin_step()
        for _ in range(number // 2):
            with part("language"):
                pass
        clock.finish_step()
        return (time.perf_counter() - start) / number
    finally:
        use_clock(None)


if __name__ == "__main__":
    main()
