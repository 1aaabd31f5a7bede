"""`megavlm data prepare` on LLaVA JSON with real photographs: samples a second and memory, beside the webdataset package's own writer.

    python benchmarks/data_prepare.py [--samples 4000] [--entries 300000] [--out benchmarks/results/data_prepare.json]

Rows, each in a process of its own:
    webdataset     json.load and webdataset.ShardWriter in one process: no check, no measuring, no hash, no journal, no index
    workers=N      megavlm: refusals, header of each picture, SHA-256, journal, catalog, fsync
    entries        text-only entries alone: what the JSON stream, the checks and the journal cost, and that memory stays flat
CPU time of workers includes their imports. Peak memory is the largest resident set (ru_maxrss) of the calling process and of its largest
child.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from megavlm.tracking.environment import environment_report

TURNS = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A temple under a clear sky. " * 4}]
SAMPLES_PER_SHARD = 500


def make_input(folder: Path, num_samples: int, num_entries: int) -> None:
    """Photographs under many names (hard links) and two JSON arrays."""
    import sklearn.datasets

    photos = [Path(sklearn.datasets.__file__).parent / "images" / name for name in ("china.jpg", "flower.jpg")]
    (folder / "pictures").mkdir()
    kept = [folder / f"{i}.jpg" for i in range(2)]
    for source, target in zip(photos, kept, strict=True):
        target.write_bytes(source.read_bytes())
    for i in range(num_samples):
        (folder / "pictures" / f"{i}.jpg").hardlink_to(kept[i % 2])
    entries = [{"id": i, "image": f"{i}.jpg", "conversations": TURNS} for i in range(num_samples)]
    (folder / "photos.json").write_text(json.dumps(entries))
    text = [{"from": "human", "value": "What is shown?"}, TURNS[1]]
    for name, count in (("entries.json", num_entries), ("entries-10th.json", num_entries // 10)):
        with (folder / name).open("w") as file:
            file.write("[" + ",\n".join(json.dumps({"id": i, "conversations": text}) for i in range(count)) + "]")


def run_webdataset(folder: Path, output: Path) -> int:
    """What a script of ten lines does."""
    import webdataset

    entries = json.loads((folder / "photos.json").read_text())
    output.mkdir()
    with webdataset.ShardWriter(f"{output}/%05d.tar", maxcount=SAMPLES_PER_SHARD, verbose=0) as writer:
        for i, entry in enumerate(entries):
            picture = (folder / "pictures" / entry["image"]).read_bytes()
            writer.write({"__key__": f"{i:09d}", "jpg": picture, "json": entry})
    return len(entries)


def run_megavlm(source: Path, output: Path, workers: int, samples_per_shard: int) -> int:
    from megavlm.data.prepare import PrepareOptions, prepare

    images = str(source.parent / "pictures")
    options = PrepareOptions("llava", str(source), str(output), images=images, workers=workers, samples_per_shard=samples_per_shard)
    return prepare(options).tally.written


def measure(mode: str, folder: Path, output: Path) -> dict[str, float]:
    """One row, in this process."""
    import megavlm.data.prepare  # noqa: F401 - imports are not what is measured

    start, cpu_before = time.perf_counter(), _cpu_s()
    if mode == "webdataset":
        count = run_webdataset(folder, output)
    elif mode.startswith("entries"):
        count = run_megavlm(folder / f"{mode}.json", output, 1, 10_000)
    else:
        count = run_megavlm(folder / "photos.json", output, int(mode.partition("=")[2]), SAMPLES_PER_SHARD)
    seconds = time.perf_counter() - start
    size = sum(p.stat().st_size for p in output.glob("*.tar"))
    peaks = {name: resource.getrusage(who).ru_maxrss / 1024 for name, who in _WHO.items()}
    cpu_s = _cpu_s() - cpu_before
    rates = {"samples_per_s": count / seconds, "samples_per_cpu_s": count / cpu_s, "mb_per_s": size / seconds / 1e6}
    return {"samples": count, "seconds": seconds, "cpu_s": cpu_s, **rates, **peaks}


def _cpu_s() -> float:
    """CPU time of this process and its ended children; on a busy machine it tells more than the clock."""
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, _WHO.values()))


_WHO = {"peak_mib": resource.RUSAGE_SELF, "largest_child_peak_mib": resource.RUSAGE_CHILDREN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--entries", type=int, default=300_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/data_prepare.json"))
    parser.add_argument("--row", nargs=3, metavar=("MODE", "FOLDER", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(arguments.row[0], Path(arguments.row[1]), Path(arguments.row[2]))))
        return
    rows = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_input(folder, arguments.samples, arguments.entries)
        for mode in ("webdataset", *(f"workers={n}" for n in arguments.workers), "entries-10th", "entries"):
            command = [sys.executable, __file__, "--row", mode, str(folder), str(folder / f"out-{mode}")]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            rows[mode] = json.loads(done.stdout.splitlines()[-1])
            print(f"{mode:12s} " + "  ".join(f"{k} {v:,.1f}" for k, v in rows[mode].items()), flush=True)
    report = {"command": "python " + " ".join(sys.argv), "environment": environment_report(), "rows": rows}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
