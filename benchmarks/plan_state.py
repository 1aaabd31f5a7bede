"""The plan's state: bytes, time to restore, memory while a million samples are planned; and when a curriculum's changes land.

    python benchmarks/plan_state.py [--samples 1000000] [--out benchmarks/results/plan_state.json]

Indexes are made up in memory (the mixes of packing.py), so that the plan alone is measured. Restoring is building a StepPlanner from a
cursor that went through JSON: checks of all columns, mixture, and all that waited. `lag` is how many steps late (early where negative)
the shares of a step are, for stages whose weights change: they are planned in draws, from expected samples a step.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from packing import make_mix

from megavlm.config.schema import DataConfig, ModelConfig, SourceConfig, StageConfig
from megavlm.data.order import SourceOrder
from megavlm.data.plan import StepPlanner
from megavlm.tracking.environment import environment_report

MODEL = ModelConfig()


@dataclass
class MadeUpIndex:
    """A source without shards: the mix of packing.py, repeated to as many rows."""

    length_tokens: npt.NDArray[np.int64]
    num_tiles: npt.NDArray[np.int64]
    num_patches: npt.NDArray[np.int64]
    patch_pairs: npt.NDArray[np.int64]
    num_targets: npt.NDArray[np.int64]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.length_tokens)


def make_index(mix: str, rows: int, seed: int = 1) -> MadeUpIndex:
    """`rows` samples of a mix."""
    samples = make_mix(mix, min(rows, 20_000), 4096, seed)
    lengths = np.resize(np.array([s.length for s in samples]), rows)
    patches = np.resize(np.array([s.patches for s in samples]), rows)
    tiles = -(-patches // 1024)
    return MadeUpIndex(lengths, tiles, patches, patches * 1024, lengths // 4, f"{mix}-{rows}-{seed}")


def planner(
    indexes: dict[str, MadeUpIndex], mixture: dict[str, object], cursor: dict[str, object] | None = None, *, packs: int = 64, **data: object
) -> StepPlanner:
    """Of a stage over made-up sources."""
    config = DataConfig.model_validate({"sources": {n: SourceConfig(path=n) for n in indexes}, "seq_len_tokens": 4096, **data})
    stage = StageConfig.model_validate({"name": "tune", "steps": 100_000, "packs_per_step": packs, "mixture": mixture})
    return StepPlanner(indexes, stage, config, MODEL, seed=1, dp_size=8, num_microbatches=packs // 8, cursor=cursor)


def resident_mb() -> float:
    """Memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def measure_restore() -> list[dict[str, object]]:
    """Bytes of the cursor and seconds to restore, for several sizes of everything."""
    rows: list[dict[str, object]] = []
    for num_sources, num_rows, window, kind in (
        (1, 100_000, 256, "constant"),
        (8, 100_000, 256, "curriculum"),
        (8, 100_000, 1024, "curriculum"),
        (50, 20_000, 256, "curriculum"),
        (4, 10_000_000, 256, "constant"),
    ):
        mixes = ("llava", "tiles", "native", "text")
        indexes = {f"collection-{i:02}": make_index(mixes[i % 4], num_rows, i) for i in range(num_sources)}
        weights = {name: 1.0 + i for i, name in enumerate(indexes)}
        mixture: dict[str, object] = dict(weights)
        if kind == "curriculum":
            mixture = {name: {"weight": {0: w, 1000: 1.0, 5000: 2 * w}, "max_epochs": 90} for name, w in weights.items()}
        steps = planner(indexes, mixture, pack_window_samples=window)
        for _ in range(20):
            plan = steps.next()
        text = json.dumps(plan.cursor_after)
        start = time.perf_counter()
        again = planner(indexes, mixture, json.loads(text), pack_window_samples=window)
        restored = time.perf_counter() - start
        assert again.next() == steps.next()
        row: dict[str, object] = {
            "sources": num_sources,
            "rows_per_source": num_rows,
            "window_samples": window,
            "mixture": kind,
            "cursor_bytes": len(text),
            "restore_s": round(restored, 3),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def measure_memory(samples: int) -> dict[str, object]:
    """Memory of the process at ten points of a long plan; sources end several epochs meanwhile."""
    indexes = {mix: make_index(mix, rows) for mix, rows in (("llava", 150_000), ("tiles", 90_000), ("native", 60_000), ("text", 20_000))}
    steps = planner(indexes, {"llava": {"weight": {0: 4, 2000: 1}}, "tiles": 2, "native": 2, "text": 1}, packs=128)
    planned, marks, start = 0.0, [], time.process_time()
    while planned < samples:
        planned += steps.next().statistics["samples"]
        if planned >= samples * (len(marks) + 1) / 10:
            marks.append(round(resident_mb(), 1))
    seconds = time.process_time() - start
    result: dict[str, object] = {
        "planned_samples": int(planned),
        "us_per_sample": round(seconds / planned * 1e6, 2),
        "resident_mb_at_tenths": marks,
        "growth_mb_after_first_tenth": round(marks[-1] - marks[0], 1),
    }
    print(result, flush=True)
    return result


def measure_huge_source() -> dict[str, object]:
    """Order of a source of 1e9 rows: memory and time, in order and far ahead."""
    before, start = resident_mb(), time.process_time()
    order = SourceOrder("web", 10**9, seed=1)
    first = order.row(987_654_321)
    opened = time.process_time() - start
    start = time.process_time()
    for number in range(200_000):
        order.row(number)
    result: dict[str, object] = {
        "rows": 10**9,
        "first_row_ms": round(opened * 1e3, 2),
        "us_per_row": round((time.process_time() - start) / 200_000 * 1e6, 2),
        "memory_mb": round(resident_mb() - before, 1),
    }
    assert 0 <= first < 10**9
    print(result, flush=True)
    return result


def measure_curriculum(num_steps: int = 1000) -> list[dict[str, object]]:
    """Lag over stages whose shares change a lot, on mixes that pack well and badly."""
    rows: list[dict[str, object]] = []
    for name, first, second, data in (
        ("llava to text", "llava", "text", {}),
        ("tiles to text", "tiles", "text", {}),
        ("tiles to native, hard patch budget", "tiles", "native", {"max_patches_per_pack": 14336}),
        ("long (packs 86 % full) to text", "long", "text", {}),
        ("llava to text, no packing", "llava", "text", {"packing": False}),
    ):
        indexes = {source: make_index(source, 20_000) for source in (first, second)}
        mixture: dict[str, object] = {first: {"weight": {0: 9, num_steps // 2: 1}}, second: {"weight": {0: 1, num_steps // 2: 9}}}
        steps = planner(indexes, mixture, packs=8, **data)
        lags = [steps.next().statistics["curriculum_lag_steps"] for _ in range(num_steps)]
        row: dict[str, object] = {
            "change": name,
            "steps": num_steps,
            "most_lag_steps": round(max(lags, key=abs), 2),
            "lag_at_the_end_steps": round(lags[-1], 2),
        }
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan_state.json")
    arguments = parser.parse_args()
    report = {
        "command": f"python benchmarks/plan_state.py --samples {arguments.samples}",
        "memory": measure_memory(arguments.samples),
        "restore": measure_restore(),
        "huge_source": measure_huge_source(),
        "curriculum": measure_curriculum(),
        "environment": environment_report(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
