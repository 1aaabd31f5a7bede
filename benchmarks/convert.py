"""How fast and how lean is conversion? A generated Llama-like model in bf16, imported and exported, beside a plain copy and transformers.

    python benchmarks/convert.py [--gigabytes 5] [--output benchmarks/results/convert.json]

Everything runs one after the other on the same disk, each in a process of its own whose peak memory the system tells (ru_maxrss).
Before each, the system is asked to drop its cache of the files (posix_fadvise), and each waits for the disk (fsync), so that none of them
only fills memory. The plain copy reads and writes the same bytes as an import or an export; transformers loads and saves the same folder.
The folder and everything made of it are deleted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

CHUNK = 16 << 20
RESULTS = Path(__file__).parent / "results" / "convert.json"
WIDTH, INNER, VOCABULARY, HEADS, GROUPS = 4096, 11008, 32000, 32, 8


def layers_for(gigabytes: float) -> int:
    """Layers of a Llama 7B's shape that make about so many bytes in bf16."""
    layer = 2 * (WIDTH * WIDTH * 2 + 2 * WIDTH * WIDTH * GROUPS // HEADS + 3 * WIDTH * INNER)
    return max(1, round((gigabytes * 1e9 - 4 * VOCABULARY * WIDTH) / layer))


def generate(folder: Path, gigabytes: float) -> None:
    """Write the folder tensor by tensor, in files of 2 GB."""
    import torch

    from megavlm.checkpoint.hf.registry import family
    from megavlm.checkpoint.hf.tensor_files import Entry
    from megavlm.checkpoint.hf.weight_files import Group, write_weights
    from megavlm.config.schema import LanguageConfig, ModelConfig

    language = LanguageConfig(
        vocab_size=VOCABULARY,
        num_layers=layers_for(gigabytes),
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        ffn_hidden_size=INNER,
    )
    model = ModelConfig(family="causal_lm", text_only=True, language=language)
    from megavlm.checkpoint.hf import TokenIds, config_to_hf

    def draw(shape: tuple[int, ...]) -> list[torch.Tensor]:
        return [torch.randn(shape).mul_(0.02).bfloat16()]

    parts = [part for link in family("causal_lm").links(model) for part in link.parts]
    groups = [Group((Entry(p.name, p.shape, torch.bfloat16),), lambda p=p: draw(p.shape)) for p in parts]  # type: ignore[misc]
    write_weights(groups, folder, 2_000_000_000, "generated")
    (folder / "config.json").write_text(json.dumps(config_to_hf(model, TokenIds(bos=1, eos=2, pad=0), dtype="bfloat16")))
    (folder / "tokenizer.json").write_text("{}")


def copy(source: Path, target: Path) -> None:
    """Read and write every byte, and wait for the disk."""
    target.mkdir()
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        (target / file.relative_to(source)).parent.mkdir(parents=True, exist_ok=True)
        with open(file, "rb", buffering=0) as read, open(target / file.relative_to(source), "wb", buffering=0) as write:
            while block := read.read(CHUNK):
                write.write(block)
            os.fsync(write.fileno())


def import_(source: Path, target: Path) -> None:
    from megavlm.checkpoint.hf.importing import import_hf

    import_hf(source, target)


def export(source: Path, target: Path) -> None:
    from megavlm.checkpoint.hf import export_hf

    export_hf(source, target)


def transformers(source: Path, target: Path) -> None:
    """Load and save as a user of transformers would, and wait for the disk as the others do."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, use_safetensors=True, trust_remote_code=False)
    model.save_pretrained(target, max_shard_size="5GB")
    for file in target.iterdir():
        with open(file, "rb+") as stream:
            os.fsync(stream.fileno())


ACTIONS: dict[str, Callable[[Path, Path], None]] = {"copy": copy, "import": import_, "export": export, "transformers": transformers}


def child(action: str, source: Path, target: Path) -> None:
    """Run one action, warmed up by its imports, and print seconds and peak memory."""
    if action == "generate":
        generate(target, float(str(source)))
        return
    if action != "copy":
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401

        import megavlm.checkpoint.hf.importing  # noqa: F401
    idle = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.perf_counter()
    ACTIONS[action](source, target)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(seconds, 2), "peak_rss_bytes": peak, "rss_after_imports_bytes": idle}))


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache."""
    for file in (p for p in folder.rglob("*") if p.is_file()):
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(action: str, source: Path, target: Path, size: int) -> dict[str, float]:
    forget(source)
    before = os.getloadavg()[0]
    command = [sys.executable, __file__, "--child", action, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    speed = round(size / found["seconds"] / 1e9, 3)
    print(f"{action}: {found['seconds']} s, {speed} GB/s, peak {found['peak_rss_bytes'] / 1e9:.2f} GB", flush=True)
    return {**found, "gb_per_s": speed, "load_average_before": round(before, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dir", type=Path, default=None, help="Where to make the folders; a temporary folder if not given.")
    parser.add_argument("--child", nargs=3, metavar=("ACTION", "SOURCE", "TARGET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], Path(options.child[1]), Path(options.child[2]))
        return
    root = Path(tempfile.mkdtemp(prefix="convert-", dir=options.dir))
    try:
        free = shutil.disk_usage(root).free
        if free < 4e9 * options.gigabytes:
            raise SystemExit(f"{root} has {free / 1e9:.0f} GB free, and {4 * options.gigabytes:.0f} are needed")
        folder, checkpoint, other = root / "hf", root / "checkpoint", root / "other"
        # In a process of its own: a child's peak begins with its parent's memory.
        subprocess.run([sys.executable, __file__, "--child", "generate", str(options.gigabytes), str(folder)], check=True)
        size = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in ("copy", "import", "export", "transformers")}
        for _ in range(options.repeats):
            for action, source, target in (
                ("copy", folder, other),
                ("import", folder, checkpoint),
                ("export", checkpoint, other),
                ("transformers", folder, other),
            ):
                shutil.rmtree(target, ignore_errors=True)
                found[action].append(measure(action, source, target, size))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    report(options, found, size)


def report(options: argparse.Namespace, found: dict[str, list[dict[str, float]]], size: int) -> None:
    import importlib.metadata

    best = {name: max(runs, key=lambda run: run["gb_per_s"]) for name, runs in found.items()}
    largest = 2 * VOCABULARY * WIDTH
    fused = 2 * 2 * INNER * WIDTH
    allowed = 3 * max(largest, fused) + 1_000_000_000
    result = {
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "safetensors", "megatron-core")},
        "model_bytes": size,
        "layers": layers_for(options.gigabytes),
        "largest_hf_tensor_bytes": max(largest, 2 * INNER * WIDTH),
        "largest_own_tensor_bytes": max(largest, fused),
        "allowed_peak_bytes": allowed,
        "runs": found,
        "time_against_copy": {name: round(best["copy"]["gb_per_s"] / best[name]["gb_per_s"], 2) for name in ("import", "export")},
        "speed_of_both_against_transformers": round(
            best["transformers"]["seconds"] / (best["import"]["seconds"] + best["export"]["seconds"]), 2
        ),
        "within_memory": all(run["peak_rss_bytes"] <= allowed for name in ("import", "export") for run in found[name]),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))


if __name__ == "__main__":
    main()
