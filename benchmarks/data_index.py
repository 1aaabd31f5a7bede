"""Indexing a large data set: rows a second and memory of each step, and what a process pays that only reads the index.

    python benchmarks/data_index.py [--scanned 40000] [--samples 1000000] [--out benchmarks/results/data_index.json]

One shard of 2000 samples (a conversation of 2 to 60 words, a picture's entry of 300x200 to 999x699 pixels, 600 bytes in the picture's
place) is linked under as many names as are asked for, so that the disk holds 2.5 MB. Steps:

    scan        tar headers and JSON of `--scanned` samples -> index.parquet (`build_catalog`), every header and JSON read and parsed anew
    headers     beside it: the same headers by Python's tarfile alone, no JSON
    tokens      conversations -> counts (`count_tokens`), on one shard, since equal conversations are counted once
    catalog     `build_catalog` of `--samples`, where a scanned shard stands for all others: what remains is putting together and writing
    index       catalog + counts + plans of all pictures -> the mapped Arrow file (`build_index`, catalog and counts being there)
    reopen      the same call in a new process: no scan; its own memory (RssAnon) after reading every planning column of every row

Rates are rows per second of one process's CPU time, so that other work on the machine does not enter; `build_catalog` and `count_tokens`
use several processes where a data set is large. Peak memory: the most that the process ever held (ru_maxrss) up to the end of that step;
start_mb of it are imports, torch's above all.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from megavlm.config.schema import DataConfig, ModelConfig, SourceConfig
from megavlm.data import catalog
from megavlm.data.catalog import build_catalog
from megavlm.data.chat import Chat
from megavlm.data.index import SampleIndex, build_index
from megavlm.data.token_table import count_tokens
from megavlm.data.tokenizer import SentencePieceTokenizer, train_sentencepiece
from megavlm.tracking.environment import environment_report

PER_SHARD = 2000
SPECIAL = ["<image>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>"]
DATA = {"seq_len_tokens": 8192, "image": {"policy": "tiles", "max_tiles": 12, "thumbnail": True}}


def make_shards(folder: Path, samples: int) -> None:
    """The data set of this file's head."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    with tarfile.open(folder / "shard-00000.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for i in range(PER_SHARD):
            words = " ".join(rng.choice(["number", "page", "stands", "see"], int(rng.integers(2, 60))))
            picture = {
                "file": f"k{i}.0.jpg",
                "width": int(rng.integers(300, 1000)),
                "height": int(rng.integers(200, 700)),
                "sha256": "0" * 64,
            }
            talk = [{"role": "user", "content": f"<image>\nWhat is {i}?"}, {"role": "assistant", "content": words}]
            text = json.dumps({"task": "read", "split": "train", "messages": talk, "images": [picture], "source": "made"}).encode()
            for name, data in ((f"k{i}.json", text), (f"k{i}.0.jpg", bytes(600))):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    link_shards(folder, samples)


def link_shards(folder: Path, samples: int) -> None:
    """Name the first shard as often as it takes for so many samples."""
    for shard in range(len(list(folder.glob("shard-*.tar"))), samples // PER_SHARD):
        os.link(folder / "shard-00000.tar", folder / f"shard-{shard:05d}.tar")


def peak_mb() -> float:
    """The most memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def open_again(folder: Path, tokenizer: SentencePieceTokenizer) -> SampleIndex:
    return build_index(
        SourceConfig(path=str(folder)), DataConfig.model_validate(DATA), ModelConfig(), "multimodal", tokenizer, progress=False
    )


def own_memory_mb() -> float:
    """Memory of this process alone: pages of mapped files, which all processes share, are not in it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1]) / 1024


def reopen(folder: Path, tokenizer: SentencePieceTokenizer) -> dict[str, float]:
    """What a process pays that only reads."""
    before, start = own_memory_mb(), time.perf_counter()
    index = open_again(folder, tokenizer)
    opened = time.perf_counter() - start
    total = 0
    for begin in range(0, len(index), 4096):  # as a planner reads: a window after a window
        span = slice(begin, begin + 4096)
        total += sum(
            int(getattr(index, c)[span].sum()) for c in ("length_tokens", "num_tiles", "num_patches", "patch_pairs", "num_targets")
        )
    return {"open_s": opened, "own_memory_mb": own_memory_mb() - before, "checksum": float(total % 1_000_003)}


def measure(scanned: int, samples: int, folder: Path) -> dict[str, Any]:
    """All steps in order."""
    shards = folder / "shards"
    make_shards(shards, scanned)
    tokenizer = train_sentencepiece(["number page stands see What is 0123456789?\n"] * 50, folder / "t.model", 400, SPECIAL)
    result: dict[str, Any] = {"samples": samples // PER_SHARD * PER_SHARD, "scanned": scanned}
    result["start_mb"] = peak_mb()

    start = time.process_time()
    with tarfile.open(shards / "shard-00000.tar") as tar:
        members = sum(1 for _ in tar)
    result["tarfile_headers_rows_per_cpu_s"] = members / 2 / (time.process_time() - start)

    start = time.process_time()
    found = build_catalog(shards, progress=False, num_workers=1)
    result["scan_rows_per_cpu_s"] = len(found) / (time.process_time() - start)

    start = time.process_time()
    count_tokens(found, np.arange(PER_SHARD), Chat("megavlm", tokenizer), progress=False, num_workers=1)
    result["tokens_rows_per_cpu_s"] = PER_SHARD / (time.process_time() - start)
    del found

    link_shards(shards, samples)
    one = catalog.shard_table(shards / "shard-00000.tar")
    at = one.schema.get_field_index("shard")

    def stand_in(path: Path) -> pa.Table:
        names = pa.array([path.name] * PER_SHARD).dictionary_encode()
        return one.set_column(at, catalog.SCHEMA.field("shard"), names)

    catalog.shard_table = stand_in  # type: ignore[assignment]
    start = time.process_time()
    built = build_catalog(shards, progress=False, num_workers=1)
    result["catalog_cpu_s"] = time.process_time() - start
    result["catalog_peak_mb"] = peak_mb()
    result["catalog_bytes_per_row"] = built.table.nbytes / len(built)
    del built

    start = time.process_time()
    index = open_again(shards, tokenizer)
    result["index_rows_per_cpu_s"] = len(index) / (time.process_time() - start)
    result["index_peak_mb"] = peak_mb()
    assert index.file is not None
    result["index_bytes_per_row"] = index.file.stat().st_size / len(index)

    again = [sys.executable, __file__, "--reopen", str(shards), str(folder / "t.model")]
    result["reopen"] = json.loads(subprocess.run(again, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scanned", type=int, default=40_000)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--reopen", nargs=2, type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.reopen:
        print(json.dumps(reopen(arguments.reopen[0], SentencePieceTokenizer(arguments.reopen[1]))))
        return
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.scanned, arguments.samples, Path(folder))
    print(json.dumps(result, indent=1))
    if arguments.out:
        command = f"python benchmarks/data_index.py --scanned {arguments.scanned} --samples {arguments.samples}"
        arguments.out.write_text(json.dumps({"command": command, "environment": environment_report(), "result": result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
