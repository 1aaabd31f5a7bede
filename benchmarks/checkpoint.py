"""What checkpoints cost: how long training stands still, how fast they are written and read, and what checking them adds.

    python benchmarks/checkpoint.py [--gib 1 0.25] [--repeats 5] [--steps 30] [--every 10] [--dir FOLDER] [--out FILE]

One rank on the CPU, a language model with Adam's moments (12 bytes a parameter). Side by side, in turns, on the same disk and bytes:

- standing still: `Saver.begin` (a copy to memory that is there already) beside a plain copy of as many bytes from memory to memory,
  torch.distributed.checkpoint's async_save (its copies are cached from the second save on) and its synchronous save;
- writing: from `begin` to the checkpoint's name, fsynced and hashed, beside a plain copy of the same bytes with fsync;
- reading: `store.load` with and without checksums, from the disk and from the system's cache, beside a plain read from the cache;
- training: seconds of a step with a checkpoint every N steps and without, in turns of N steps.

Goals: at most 0.1 s a GiB; 1 % of step time with a checkpoint every 10 steps; checksums at most 10 % of a load.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from megavlm.checkpoint import folders, store
from megavlm.checkpoint.pieces import pieces_of
from megavlm.checkpoint.saver import Saver
from megavlm.config.schema import ParallelConfig, Recipe
from megavlm.models.init import initialise
from megavlm.parallel.context import ParallelContext, enter_grid, leave_grid, start_process_group, stop_process_group
from megavlm.testing.tiny import tiny_batch, tiny_chunks, tiny_model_config
from megavlm.tracking.environment import environment_report
from megavlm.training.build import StageModel, wrap_for_training
from megavlm.training.step import train_step

CPU = torch.device("cpu")
GIB = 1 << 30
_LAYERS = 8
_HEADS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, nargs="+", default=[1.0, 0.25], help="sizes of the checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=30, help="of training on each side; a multiple of --every")
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--seq-len-tokens", type=int, default=1024, help="of a step of training")
    parser.add_argument("--dir", type=Path, help="where checkpoints are written (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "checkpoint.json")
    arguments = parser.parse_args()
    start_process_group(CPU, 600.0)
    results = []
    for gib in arguments.gib:
        with tempfile.TemporaryDirectory(dir=arguments.dir) as folder:
            results.append(measure(Path(folder), gib, arguments))
            show(results[-1])
    stop_process_group()
    report = {"command": " ".join(["python", "benchmarks/checkpoint.py", *sys.argv[1:]]), "sizes": results}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({**report, "environment": environment_report()}, indent=1) + "\n")
    os._exit(0)  # torch's async_save leaves a process group of its own behind


def measure(folder: Path, gib: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """All four comparisons with a checkpoint of about `gib` GiB."""
    model, ctx = build(gib)
    saver = Saver(model.modules, model.optimizer, ctx, timeout_s=600.0)
    start = time.perf_counter()
    saver.warm_up()
    found: dict[str, Any] = {"gib": saver.host_bytes / GIB, "warm_up_s": time.perf_counter() - start}
    found |= saving(folder, saver, model, ctx, arguments.repeats)
    found |= loading(folder, model, ctx, arguments.repeats)
    found |= training(folder, saver, model, ctx, arguments)
    leave_grid()
    return found


def build(gib: float) -> tuple[StageModel, ParallelContext]:
    """A model whose weights and moments take that much."""
    # Of a layer: 4 h^2 in attention, 3 x 4 h^2 in the MLP; 12 bytes a parameter.
    hidden = int((gib * GIB / 12 / _LAYERS / 16) ** 0.5) // (8 * _HEADS) * 8 * _HEADS
    sizes = {"num_layers": _LAYERS, "hidden_size": hidden, "num_attention_heads": _HEADS, "num_query_groups": _HEADS}
    config, parallel = tiny_model_config(**sizes, ffn_hidden_size=4 * hidden, max_positions=8192), ParallelConfig()
    ctx = enter_grid(parallel, CPU, seed=1)
    modules = tiny_chunks(config, ctx, parallel)
    initialise(modules, config, 0, ctx)
    stage = {"name": "s", "steps": 9, "mixture": {"a": 1.0}}
    values = {"run": {"dir": "unused"}, "model": config.model_dump(), "precision": {"dtype": "fp32"}}
    recipe = Recipe.model_validate(values | {"data": {"sources": {"a": {"path": "unused"}}}, "stages": [stage]})
    return wrap_for_training(modules, recipe, recipe.stages[0], parallel), ctx


def saving(folder: Path, saver: Saver, model: StageModel, ctx: ParallelContext, repeats: int) -> dict[str, Any]:
    """Seconds that training stands still, and bytes a second to the disk, on each side."""
    path, copy, other = folder / "checkpoints" / "00000001-a", folder / "copy", folder / "dcp"
    pieces = pieces_of(model.modules, model.optimizer, ctx)
    state = {f"{piece.key}/{number}": piece.tensor for number, piece in enumerate([*pieces.model, *pieces.optimizer])}
    stall, in_memory, written, copied, dcp_stall, dcp_whole = [], [], [], [], [], []
    source, target = (torch.full((saver.host_bytes,), 1, dtype=torch.uint8) for _ in range(2))
    for _ in range(repeats + 1):
        shutil.rmtree(path, ignore_errors=True)  # replacing one takes the time of its deletion besides
        os.sync()  # nobody pays for what the one before has left to the system
        in_memory.append(seconds_of(lambda: target.copy_(source)))
        start = time.perf_counter()
        saver.begin(path, {"step": 1})
        stall.append(time.perf_counter() - start)
        outcome = saver.wait()
        assert outcome is not None and outcome.error is None, outcome
        written.append(outcome.seconds)
        os.sync()
        copied.append(seconds_of(lambda: copy_all(path, copy)))
        shutil.rmtree(copy)
        os.sync()
        start = time.perf_counter()
        running = dcp.async_save(state, checkpoint_id=other)
        dcp_stall.append(time.perf_counter() - start)
        running.result()  # type: ignore[union-attr]
        shutil.rmtree(other)
        os.sync()
        dcp_whole.append(seconds_of(lambda: dcp.save(state, checkpoint_id=other)))
        shutil.rmtree(other)
    gib = sum(p.stat().st_size for p in path.iterdir()) / GIB
    # The first of each takes memory and imports; medians of the others.
    middle = [statistics.median(seconds[1:]) for seconds in (stall, written, copied, dcp_stall, dcp_whole, in_memory)]
    return {
        "stall_s_per_gib": middle[0] / gib,
        "memory_copy_s_per_gib": middle[5] / gib,
        "save_gib_per_s": gib / middle[1],
        "plain_copy_gib_per_s": gib / middle[2],
        "torch_async_stall_s_per_gib": middle[3] / gib,
        "torch_save_gib_per_s": gib / middle[4],
        "stall_s": stall,
        "memory_copy_s": in_memory,
        "save_s": written,
        "plain_copy_s": copied,
        "torch_async_stall_s": dcp_stall,
        "torch_save_s": dcp_whole,
    }


def loading(folder: Path, model: StageModel, ctx: ParallelContext, repeats: int) -> dict[str, Any]:
    """Bytes a second from the disk's cache into the model and its optimizer."""
    path = folder / "checkpoints" / "00000001-a"
    gib = sum(p.stat().st_size for p in path.iterdir()) / GIB
    sides: dict[str, Callable[[], object]] = {
        "load_from_disk": lambda: store.load(path, model.modules, model.optimizer, ctx),
        "load_from_disk_without_checksums": lambda: store.load(path, model.modules, model.optimizer, ctx, verify=False),
        "load": lambda: store.load(path, model.modules, model.optimizer, ctx),
        "load_without_checksums": lambda: store.load(path, model.modules, model.optimizer, ctx, verify=False),
        "checksums": lambda: folders.verify(path),
        "plain_read": lambda: read_all(path),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(repeats + 1):
        for name, run in sides.items():
            if "disk" in name:
                forget(path)
            spent = seconds_of(run)
            if number:
                seconds[name].append(spent)
    middle = {name: statistics.median(spent) for name, spent in seconds.items()}
    return {
        "load_gib_per_s": gib / middle["load"],
        "plain_read_gib_per_s": gib / middle["plain_read"],
        "load_from_disk_gib_per_s": gib / middle["load_from_disk"],
        "checksums_share_of_load": middle["load"] / middle["load_without_checksums"] - 1,
        "checksums_share_of_load_from_disk": middle["load_from_disk"] / middle["load_from_disk_without_checksums"] - 1,
        "loading_s": seconds,
    }


def training(folder: Path, saver: Saver, model: StageModel, ctx: ParallelContext, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step with a checkpoint every N of them and without, in turns of N."""
    batch = tiny_batch(tiny_model_config(), seq_len_tokens=arguments.seq_len_tokens, images_per_sample=(0, 0, 0))
    train_step(model, [batch], ["tiny"], ctx)
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    for _ in range(max(arguments.steps // arguments.every, 1)):
        for side, spent in seconds.items():
            start = time.perf_counter()
            for step in range(arguments.every):
                train_step(model, [batch], ["tiny"], ctx)
                saver.advance(saver._agree())
                if side == "with" and step == 0:
                    saver.begin(folder / "checkpoints" / "00000002-a", {"step": 2})
            spent.append((time.perf_counter() - start) / arguments.every)
            saver.wait()
    with_saves, without = (statistics.median(spent) for spent in seconds.values())
    return {"every_steps": arguments.every, "step_s": without, "share_of_step_time": with_saves / without - 1, "steps_s": seconds}


def seconds_of(run: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def copy_all(source: Path, target: Path) -> None:
    """A plain copy, fsynced."""
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)
        with open(target / file.name, "rb") as stream:
            os.fsync(stream.fileno())


def read_all(path: Path) -> None:
    """Every byte, into memory that is used again."""
    buffer = bytearray(16 << 20)
    for file in path.iterdir():
        with open(file, "rb") as stream:
            while stream.readinto(buffer):
                pass


def forget(path: Path) -> None:
    """Ask the system to drop the files from its cache."""
    for file in path.iterdir():
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(found: dict[str, Any]) -> None:
    """The figures that have goals, and what they stand beside."""
    print(
        f"{found['gib']:.2f} GiB: training stands still {found['stall_s_per_gib']:.3f} s a GiB (goal 0.1; a plain copy in memory "
        f"{found['memory_copy_s_per_gib']:.3f}, torch's async_save {found['torch_async_stall_s_per_gib']:.3f})\n"
        f"  saved at {found['save_gib_per_s']:.2f} GiB/s (plain copy {found['plain_copy_gib_per_s']:.2f}, torch's save "
        f"{found['torch_save_gib_per_s']:.2f})\n"
        f"  loaded at {found['load_gib_per_s']:.2f} GiB/s (plain read {found['plain_read_gib_per_s']:.2f}; from the disk "
        f"{found['load_from_disk_gib_per_s']:.2f}); checksums add {found['checksums_share_of_load_from_disk']:.1%} (goal 10 %), "
        f"{found['checksums_share_of_load']:.1%} from the system's cache\n"
        f"  a checkpoint every {found['every_steps']} steps of {found['step_s']:.2f} s adds {found['share_of_step_time']:.2%} (goal 1 %)"
    )


if __name__ == "__main__":
    main()
