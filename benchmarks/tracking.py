"""What MLflow adds to a step and to a run's end, whatever its server does; goals: under 1 ms at the 99th percentile, exit under 5 s.

    python benchmarks/tracking.py [--rounds 6] [--steps 100] [--out benchmarks/results/tracking.json]

A step is Python and many small products, as a training step that launches kernels is: work that holds the interpreter, from which a
thread beside it would take time. Sides take turns, `--steps` steps each: no tracking, an sqlite store, a real server, one that was frozen
(SIGSTOP) after the run began, one that nobody listens at. Each step puts a record of 5 numbers, every tenth one of 40. "added" is the
difference of the side's percentile to that of no tracking; "put" is the call alone, whose 99th percentile holds no other noise.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from timing import write_report

from megavlm.config.schema import TrackingConfig
from megavlm.testing.mlflow_server import DEAD_SERVER, MlflowServer
from megavlm.tracking.mlflow_sink import MlflowSink

SIDES = ("no tracking", "sqlite", "server", "frozen server", "dead server")
CONNECT_TIMEOUT_S = 240.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=100, help="of each side in a round")
    parser.add_argument("--products", type=int, default=2000, help="small products in a step: 2000 are some 10 ms")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.rounds, arguments.steps, arguments.products)
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    write_report(arguments.out, "cpu", result)


def measure(rounds: int, steps: int, products: int) -> dict[str, Any]:
    """Seconds of steps, puts and exits of each side."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in ("server", "frozen server"):
            (folder / side).mkdir()
        with MlflowServer(folder / "server") as server, MlflowServer(folder / "frozen server") as frozen:
            uris = {"sqlite": None, "server": server.uri, "frozen server": frozen.uri, "dead server": DEAD_SERVER}
            sinks = {
                side: MlflowSink(TrackingConfig(mlflow_uri=uri), side, folder / side / "run", resume_step=0) for side, uri in uris.items()
            }
            _wait_until_connected([sink for side, sink in sinks.items() if side != "dead server"])
            frozen.freeze()
            seconds, puts = _take_turns(sinks, rounds, steps, products)
            exits = {side: _exit(sink) for side, sink in sinks.items()}
    base = seconds["no tracking"]
    return {
        "steps": len(base),
        "step_ms": {f"p{p}": 1e3 * _percentile(base, p) for p in (50, 99)},
        "sides": {
            side: {
                **{f"added_p{p}_ms": 1e3 * (_percentile(seconds[side], p) - _percentile(base, p)) for p in (50, 99)},
                **{f"put_p{p}_ms": 1e3 * _percentile(puts[side], p) for p in (50, 99)},
                **exits[side],
            }
            for side in sinks
        },
    }


def _take_turns(
    sinks: dict[str, MlflowSink], rounds: int, steps: int, products: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    puts: dict[str, list[float]] = {side: [] for side in SIDES}
    done = 0
    for number in range(rounds + 1):
        for side in SIDES:
            for _ in range(steps):
                done += 1
                whole, put = _step(sinks.get(side), done, products)
                if number:  # the first round warms up
                    seconds[side].append(whole)
                    puts[side].append(put)
    return seconds, puts


def _step(sink: MlflowSink | None, number: int, products: int) -> tuple[float, float]:
    """Seconds of a step with its record, and of the record alone."""
    begin = time.perf_counter()
    values = torch.ones(200)
    for _ in range(products):
        values = values * 0.999 + 0.001
    before = time.perf_counter()
    if sink is not None:
        sink.metrics(number, {f"m{i}": float(number) for i in range(5 if number % 10 else 40)})
    end = time.perf_counter()
    return end - begin, end - before


def _exit(sink: MlflowSink) -> dict[str, float]:
    begin = time.perf_counter()
    waiting = sink.finish()
    return {"exit_s": time.perf_counter() - begin, "records_in_the_spool": waiting}


def _wait_until_connected(sinks: list[MlflowSink]) -> None:
    end = time.monotonic() + CONNECT_TIMEOUT_S
    while any(sink.run_id is None for sink in sinks):
        if time.monotonic() > end:
            raise TimeoutError(f"no MLflow run in {CONNECT_TIMEOUT_S:.0f} s")
        time.sleep(0.2)


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))]


if __name__ == "__main__":
    main()
