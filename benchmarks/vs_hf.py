"""Training speed of megavlm against Hugging Face transformers: same weights, samples, optimizer, dtype; one process; side by side.

    python benchmarks/vs_hf.py [--size tiny|100m] [--dtype fp32|bf16] [--threads 2] [--steps 5] [--recompute none|selective|full]

Two workloads, in useful tokens per second (padding does not count):
  equal      samples of one length: HF pads nothing
  realistic  a long-tailed mix of lengths and image counts: HF pads each batch to its longest sample, as its collator does

Both sides alternate step by step, so that a busy machine hurts both. Losses of the first step must agree, or nothing is written.
`share_of_matmul_rate`: FLOPs of the formula over seconds, as a share of what a plain matmul of this format reaches on the same threads, in
the same run. `cpu`: processor seconds of the program and of the system for it, presumably for fresh pages of memory, whose price
is the machine's: `ratio_of_user_seconds` is without it. Peak memory: what each side, alone in a process of its own, adds over
three steps to what its imports took; freed blocks go back to the system at once (MALLOC_MMAP_THRESHOLD_), because glibc would keep them.
`floor` is the planner's count for megavlm's pack: weights, gradients and Adam's moments, which both sides hold; what autograd keeps from
the forward to the backward pass, with `--recompute` as it is; and the head. `left_for_activations_mib` is what half of Hugging Face's peak
leaves beside the first: where more is kept, only recomputation gets there: `--recompute` (selective: the MLPs), for megavlm alone.
Writes benchmarks/results/vs_hf-<size>-<dtype>.json, with recomputation vs_hf-<size>-<dtype>-<recompute>.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def _shape(width: int, inner: int, layers: int, heads: int, **more: int) -> dict[str, int]:
    return {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads, **more}


SIZES: dict[str, dict[str, dict[str, int]]] = {
    "tiny": {
        "vision": _shape(128, 512, 3, 4, image_size=64, patch_size=8),
        "text": _shape(192, 512, 4, 6, vocab_size=4096),
    },
    "100m": {
        "vision": _shape(384, 1536, 6, 6, image_size=224, patch_size=16),
        "text": _shape(640, 1728, 10, 10, vocab_size=32000),
    },
}
RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute": "selective", "recompute_modules": ["mlp"]},
    "full": {"recompute": "full"},
}
"""megavlm's `parallel` block."""
IMAGE_TOKEN = 3
TARGET_SHARE = 0.25


@dataclass
class Sample:
    """One conversation: token ids with expanded placeholders, which tokens are targets, and its tiles."""

    tokens: Any
    is_target: Any
    tiles: Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=sorted(SIZES), default="100m")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="samples in a Hugging Face batch")
    parser.add_argument("--recompute", choices=["none", "selective", "full"], default="none", help="of megavlm's layers")
    parser.add_argument("--memory-of", choices=["hf", "megavlm"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(json.dumps(memory_of(args)))
        return
    memory = {side: memory_apart(side) for side in ("hf", "megavlm")}
    hf, ours = build(args.size, args.dtype, args.recompute)
    rate = matmul_flops_per_s(args.dtype)
    results = {}
    for name, lengths in WORKLOADS.items():
        batches = [make_samples(lengths(args.size, args.batch, seed), args.size, seed) for seed in range(args.steps + 1)]
        results[name] = compare(hf, ours, batches, rate)
        peaks = {side: memory[side][name] for side in memory}
        found = {"ratio": round(peaks["megavlm"] / peaks["hf"], 3), "floor": memory_floor(ours, memory_batches(args, lengths), peaks["hf"])}
        results[name]["peak_memory_mib"] = peaks | found
        print(f"{name:10s} {json.dumps(results[name])}")
    save(args, results, rate)


def memory_apart(side: str) -> dict[str, float]:
    """`memory_of` in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", side]
    done = subprocess.run(command, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory_of(args: argparse.Namespace) -> dict[str, float]:
    """MiB at the peak of three steps of each workload, of one side, over what its imports took."""
    from transformers import LlavaForConditionalGeneration  # noqa: F401

    import megavlm.training.build  # noqa: F401
    from megavlm.tracking.process_memory import ProcessMemory

    found = {}
    memory = ProcessMemory()
    with hf_folder(args.size) as folder:
        side = HuggingFace(folder, args.dtype) if args.memory_of == "hf" else Megavlm(folder, args.dtype, args.recompute)
    for name, lengths in WORKLOADS.items():
        memory.restart()
        for samples in memory_batches(args, lengths):
            side.step(samples)
        found[name] = round(memory.peak_bytes() / 2**20, 1)
    return found


def memory_batches(args: argparse.Namespace, lengths: Any) -> list[list[Sample]]:
    """Of three steps."""
    return [make_samples(lengths(args.size, args.batch, seed), args.size, seed) for seed in range(3)]


def memory_floor(ours: Megavlm, batches: list[list[Sample]], hf_peak_mib: float) -> dict[str, float]:
    """MiB that the planner counts for the fullest of `batches` as megavlm packs it."""
    from megavlm.planner.memory import Fullest, estimate_memory
    from megavlm.topology.grid import RankGrid

    recipe = ours.recipe
    grid, counted = RankGrid.from_config(recipe.parallel, 1), []
    for samples in batches:
        tiles, targets = sum(len(s.tiles) for s in samples), sum(int(s.is_target.sum()) for s in samples)
        data = recipe.data.model_copy(update={"seq_len_tokens": sum(s.tokens.numel() for s in samples)})
        fullest = Fullest(tiles, tiles * recipe.model.vision.num_patches, targets)
        own = (recipe.model, recipe.stages[0], data, grid, recipe.parallel, recipe.precision)
        counted.append(estimate_memory(*own, device="cpu", fullest=fullest)[0])
    most = max(counted, key=lambda estimate: estimate.total_bytes)
    state = most.parameters_bytes + most.gradients_bytes + most.optimizer_bytes
    parts = {"state_mib": state, "activations_mib": most.activations_bytes, "head_mib": most.head_bytes, "total_mib": most.total_bytes}
    found = {name: round(number / 2**20, 1) for name, number in parts.items()}
    return found | {
        "state_over_hf": round(found["state_mib"] / hf_peak_mib, 3),
        "total_over_hf": round(found["total_mib"] / hf_peak_mib, 3),
        "left_for_activations_mib": round(hf_peak_mib / 2 - found["state_mib"], 1),
    }


def matmul_flops_per_s(dtype: str, size: int = 1536) -> float:
    """Best of ten square products."""
    import torch

    a, b = (torch.randn(size, size).to(torch.float32 if dtype == "fp32" else torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def equal_lengths(size: str, count: int, seed: int) -> list[tuple[int, int]]:
    """(text tokens, images) of each sample."""
    return [(316 if size == "100m" else 96, 1)] * count


def realistic_lengths(size: str, count: int, seed: int) -> list[tuple[int, int]]:
    """Log-normal text lengths (median 80, sigma 0.9) and 0, 1 or 2 images (20, 65, 15 %), as instruction data have them."""
    import numpy as np

    rng = np.random.default_rng(seed)
    longest = 1200 if size == "100m" else 400
    text = np.clip(rng.lognormal(np.log(80), 0.9, count), 16, longest).astype(int)
    return list(zip(text.tolist(), rng.choice(3, size=count, p=[0.2, 0.65, 0.15]).tolist(), strict=True))


WORKLOADS = {"equal": equal_lengths, "realistic": realistic_lengths}


def make_samples(shapes: list[tuple[int, int]], size: str, seed: int) -> list[Sample]:
    import torch

    vision, vocab = SIZES[size]["vision"], SIZES[size]["text"]["vocab_size"]
    side, per_tile = vision["image_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for text, images in shapes:
        words = torch.randint(10, vocab, (text,), generator=generator)
        tokens = torch.cat([words[:4], torch.full((images * per_tile,), IMAGE_TOKEN), words[4:]])
        is_target = torch.zeros(tokens.numel(), dtype=torch.bool)
        is_target[-max(1, int(TARGET_SHARE * text)) :] = True
        tiles = torch.randint(0, 256, (images, 3, side, side), generator=generator, dtype=torch.uint8)
        samples.append(Sample(tokens, is_target, tiles))
    return samples


class HuggingFace:
    """LlavaForConditionalGeneration with right-padded batches and torch's fused AdamW."""

    def __init__(self, folder: str, dtype: str) -> None:
        import torch
        from transformers import LlavaForConditionalGeneration

        self.dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
        self.model = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=self.dtype, attn_implementation="sdpa", use_safetensors=True
        ).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
        self.std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)

    def step(self, samples: list[Sample]) -> float:
        import torch

        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad([s.tokens for s in samples], batch_first=True)
        mask = pad([torch.ones_like(s.tokens) for s in samples], batch_first=True)
        labels = pad([torch.where(s.is_target, s.tokens, -100) for s in samples], batch_first=True, padding_value=-100)
        tiles = torch.cat([s.tiles for s in samples])
        pixels = ((tiles.float() / 255 - self.mean) / self.std).to(self.dtype) if len(tiles) else None
        self.optimizer.zero_grad()
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels, pixel_values=pixels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(loss)


class Megavlm:
    """The same weights in megavlm, packed."""

    def __init__(self, folder: str, dtype: str, recompute: str) -> None:
        import torch

        from megavlm.checkpoint.hf import config_from_hf, load_hf
        from megavlm.config.schema import Recipe
        from megavlm.parallel.context import enter_grid, start_process_group
        from megavlm.training.build import build_chunks, wrap_for_training

        everything = {"train": "full"}
        stage = {"name": "s", "steps": 100, "mixture": {"x": 1.0}, "vision": everything, "optimizer": {"lr": 1e-5}}
        self.recipe = Recipe.model_validate(
            {
                "run": {"dir": "unused", "device": "cpu"},
                "model": config_from_hf(folder).model_dump(),
                "precision": {"dtype": dtype},
                "parallel": RECOMPUTE[recompute],
                "data": {"sources": {"x": {"path": "unused"}}},
                "stages": [stage],
            }
        )
        start_process_group(torch.device("cpu"), 60)
        self.ctx = enter_grid(self.recipe.parallel, torch.device("cpu"), 0)
        chunks = build_chunks(self.recipe, self.recipe.stages[0], self.recipe.parallel, self.ctx)
        load_hf(chunks, folder, self.recipe.model, self.ctx)
        self.model = wrap_for_training(chunks, self.recipe, self.recipe.stages[0], self.recipe.parallel)

    def step(self, samples: list[Sample]) -> float:
        from megavlm.training.optimizer import set_learning_rate
        from megavlm.training.step import train_step

        set_learning_rate(self.model.optimizer, self.recipe.stages[0], 0)
        return train_step(self.model, [as_pack(samples)], ["x"], self.ctx)[0].loss


def as_pack(samples: list[Sample]) -> Any:
    """The samples end to end as one PackedBatch."""
    import torch

    from megavlm.data.types import PackedBatch, SampleRef

    lengths = [s.tokens.numel() for s in samples]
    tokens = torch.cat([s.tokens for s in samples])
    targets = torch.nonzero(torch.cat([s.is_target for s in samples])).squeeze(1)
    tiles = torch.cat([s.tiles for s in samples])
    return PackedBatch(
        tokens_S=tokens,
        positions_S=torch.cat([torch.arange(n) for n in lengths]),
        segment_lengths=lengths,
        segment_samples=[SampleRef("x", i) for i in range(len(samples))],
        segment_tasks=["x"] * len(samples),
        target_positions_Q=targets - 1,
        target_ids_Q=tokens[targets],
        target_weights_Q=torch.ones(targets.numel()),
        target_segments_Q=torch.repeat_interleave(torch.arange(len(samples)), torch.tensor([int(s.is_target.sum()) for s in samples])),
        image_positions_N=torch.nonzero(tokens == IMAGE_TOKEN).squeeze(1),
        num_tiles=len(tiles),
        tiles_TCHW=tiles if len(tiles) else None,
    )


def build(size: str, dtype: str, recompute: str) -> tuple[HuggingFace, Megavlm]:
    """Both sides from one randomly initialised Hugging Face folder."""
    with hf_folder(size) as folder:
        return HuggingFace(folder, dtype), Megavlm(folder, dtype, recompute)


@contextmanager
def hf_folder(size: str) -> Iterator[str]:
    """A randomly initialised model as a Hugging Face folder."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**SIZES[size]["vision"]),
        text_config=LlamaConfig(**SIZES[size]["text"], max_position_embeddings=4096, tie_word_embeddings=False),
        image_token_index=IMAGE_TOKEN,
        vision_feature_layer=-2,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        LlavaForConditionalGeneration(config).save_pretrained(folder)
        yield folder


def flops_of(ours: Megavlm, samples: list[Sample]) -> int:
    """What the samples need by formula, without padding."""
    from megavlm.planner.flops import VisionWork, pack_flops

    model = ours.recipe.model
    work = VisionWork.of([model.vision.num_patches] * sum(len(s.tiles) for s in samples))
    targets = sum(int(s.is_target.sum()) for s in samples)
    return pack_flops(model, [s.tokens.numel() for s in samples], work, targets).total


def compare(hf: HuggingFace, ours: Megavlm, batches: list[list[Sample]], matmul_rate: float) -> dict[str, Any]:
    """Alternate steps of both sides; the first warms up, and its losses must agree."""
    first = hf.step(batches[0]), ours.step(batches[0])
    tolerance = 1e-3 if ours.recipe.precision.dtype == "fp32" else 3e-2
    if abs(first[0] - first[1]) > tolerance * first[0]:
        sys.exit(f"the two sides do not compute the same loss: Hugging Face {first[0]}, megavlm {first[1]}")
    seconds: dict[str, list[float]] = {"hf": [], "megavlm": []}
    cpu = {name: {"user_s": 0.0, "system_s": 0.0} for name in seconds}
    for samples in batches[1:]:
        for name, side in (("hf", hf), ("megavlm", ours)):
            start, used = time.perf_counter(), os.times()
            side.step(samples)
            seconds[name].append(time.perf_counter() - start)
            for kind, before, after in zip(cpu[name], used, os.times(), strict=False):  # user and system come first
                cpu[name][kind] += after - before
    useful = sum(s.tokens.numel() for samples in batches[1:] for s in samples)
    padded = sum(len(samples) * max(s.tokens.numel() for s in samples) for samples in batches[1:])
    flops = sum(flops_of(ours, samples) for samples in batches[1:])
    speed = {name: useful / sum(times) for name, times in seconds.items()}
    return {
        "hf_tokens_per_s": round(speed["hf"], 1),
        "megavlm_tokens_per_s": round(speed["megavlm"], 1),
        "ratio": round(speed["megavlm"] / speed["hf"], 3),
        "ratio_of_medians": round(statistics.median(seconds["hf"]) / statistics.median(seconds["megavlm"]), 3),
        "share_of_matmul_rate": {side: round(flops / sum(times) / matmul_rate, 3) for side, times in seconds.items()},
        "cpu": {name: {kind: round(value, 2) for kind, value in used.items()} for name, used in cpu.items()},
        "ratio_of_user_seconds": round(cpu["hf"]["user_s"] / cpu["megavlm"]["user_s"], 3),
        "hf_padding_share": round(1 - useful / padded, 3),
        "first_losses": first,
        "seconds": seconds,
    }


def save(args: argparse.Namespace, results: dict[str, Any], matmul_rate: float) -> None:
    import megatron.core
    import torch
    import transformers

    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    report = {
        "command": "python benchmarks/vs_hf.py " + " ".join(sys.argv[1:]),
        "hardware": f"{os.cpu_count()} cores, {_cpu_name()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron-core": megatron.core.__version__,
            "transformers": transformers.__version__,
        },
        "matmul_tflops": round(matmul_rate / 1e12, 4),
        "results": results,
    }
    suffix = "" if args.recompute == "none" else f"-{args.recompute}"
    path = folder / f"vs_hf-{args.size}-{args.dtype}{suffix}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


def _cpu_name() -> str:
    out = subprocess.run(["lscpu"], capture_output=True, text=True, check=False).stdout
    return next((line.split(":", 1)[1].strip() for line in out.splitlines() if line.startswith("Model name")), platform.machine())


if __name__ == "__main__":
    main()
