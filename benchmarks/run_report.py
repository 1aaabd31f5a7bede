"""What a finished run's metrics say, stage by stage: pack fill, time spent waiting for data, tokens per second, MFU, duration.

    python benchmarks/run_report.py runs/quickstart [--output benchmarks/results/quickstart.json]

Reads metrics.jsonl, environment.json and, when there, evaluation/evaluation.json of the run's folder; measures nothing itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from megavlm.tracking.metrics import read_metrics


def stage_report(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Totals of one stage. The first step (imports, first touch of memory) counts in the totals, not in the medians."""
    steady = records[1:] or records
    time_s = sum(r["step_time_s"] for r in records)
    return {
        "steps": len(records),
        "seconds": round(time_s, 1),
        "pack_fill": round(sum(r["useful_tokens"] for r in records) / sum(r["tokens"] for r in records), 5),
        "data_wait_share": round(sum(r["data_wait_s"] for r in records) / time_s, 5),
        "data_wait_ms_per_step_median": round(1e3 * statistics.median(r["data_wait_s"] for r in steady), 3),
        "step_ms_median": round(1e3 * statistics.median(r["step_time_s"] for r in steady), 1),
        "useful_tokens_per_s": round(sum(r["useful_tokens"] for r in records) / time_s, 1),
        "mfu_median": round(statistics.median(r["mfu"] for r in steady), 4),
        "last_loss": records[-1]["loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in read_metrics(args.run_dir):
        stages.setdefault(record["stage"], []).append(record)
    report: dict[str, Any] = {
        "environment": json.loads((args.run_dir / "environment.json").read_text()),
        "stages": {name: stage_report(records) for name, records in stages.items()},
    }
    evaluation = args.run_dir / "evaluation" / "evaluation.json"
    if evaluation.exists():
        report["held_out"] = json.loads(evaluation.read_text())
    for name, values in report["stages"].items():
        print(f"{name:12s} " + "  ".join(f"{k} {v}" for k, v in values.items()))
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n")
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
