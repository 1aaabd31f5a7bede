"""One script for the first minutes on a GPU: what is there, whether training equals the CPU's, and how fast it is.

    python benchmarks/gpu_validate.py [--output benchmarks/results/gpu_validate.json] [--steps 10]

Needs a CUDA device; without one it says so and exits with 2. Ceilings (a plain bf16 matmul) are measured beside the model, in
the same run, so that the share of them means something. Transformer Engine is used when it is importable, and reported.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "gpu_validate.json")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu_validate: torch sees no CUDA device; nothing was measured", file=sys.stderr)
        sys.exit(2)
    from megavlm.tracking.environment import environment_report

    report: dict[str, Any] = {"command": "python benchmarks/gpu_validate.py", "environment": environment_report()}
    report["matmul_bf16_tflops"] = matmul_tflops()
    report["model"] = train_speed(args.steps)
    report["model"]["share_of_matmul"] = report["model"]["tflops"] / report["matmul_bf16_tflops"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "environment"}, indent=1))


def matmul_tflops(size: int = 8192, repeats: int = 20) -> float:
    """Rate of a square bf16 matmul."""
    import torch

    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        a @ b
    torch.cuda.synchronize()
    return 2 * size**3 * repeats / (time.perf_counter() - start) / 1e12


def train_speed(steps: int) -> dict[str, Any]:
    """A 1B-parameter LLaVA on synthetic packs of 8192 tokens in bf16: FLOPs by formula over measured seconds."""
    import torch

    from megavlm.config.schema import Recipe
    from megavlm.models.init import initialise
    from megavlm.models.layers.specs import has_transformer_engine
    from megavlm.parallel.context import enter_grid, start_process_group
    from megavlm.planner.flops import VisionWork, pack_flops
    from megavlm.training.build import build_chunks, wrap_for_training
    from megavlm.training.optimizer import set_learning_rate
    from megavlm.training.step import train_step

    language = {"vocab_size": 32064, "num_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "ffn_hidden_size": 5632}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe.model_validate(
            {
                "run": {"dir": folder, "device": "cuda", "deterministic": False},
                "model": {"language": {**language, "max_positions": 8192}},
                "precision": {"dtype": "bf16"},
                "data": {"sources": {"x": {"path": "unused"}}, "seq_len_tokens": 8192},
                "stages": [{"name": "s", "steps": 1000, "mixture": {"x": 1.0}, "vision": {"train": "full"}}],
            }
        )
    device, stage = torch.device("cuda", 0), recipe.stages[0]
    start_process_group(device, 120)
    ctx = enter_grid(recipe.parallel, device, 0)
    chunks = build_chunks(recipe, stage, recipe.parallel, ctx)
    initialise(chunks, recipe.model, 0, ctx)
    model = wrap_for_training(chunks, recipe, stage, recipe.parallel)
    batch = synthetic_pack(recipe.model.visual_tokens_per_tile)
    set_learning_rate(model.optimizer, stage, 0)
    losses = [train_step(model, [batch], ["x"], ctx)[0].loss for _ in range(3)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    losses += [train_step(model, [batch], ["x"], ctx)[0].loss for _ in range(steps)]
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / steps
    work = VisionWork.uniform(batch.num_tiles, recipe.model.vision.num_patches)
    flops = pack_flops(recipe.model, batch.segment_lengths, work, int(batch.target_ids_Q.numel()), stage).total
    return {
        "transformer_engine": has_transformer_engine(),
        "step_s": seconds,
        "tflops": flops / seconds / 1e12,
        "tokens_per_s": batch.num_tokens / seconds,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
        "losses": losses,
    }


def synthetic_pack(per_tile: int) -> Any:
    """8192 tokens: 8 samples of 1024, each with one tile, a fifth of the text supervised."""
    import torch

    from megavlm.data.types import PackedBatch, SampleRef

    generator = torch.Generator().manual_seed(0)
    lengths = [1024] * 8
    tokens = torch.randint(10, 32000, (8192,), generator=generator)
    images = torch.cat([torch.arange(i * 1024 + 4, i * 1024 + 4 + per_tile) for i in range(8)])
    tokens[images] = 3
    targets = torch.cat([torch.arange((i + 1) * 1024 - 90, (i + 1) * 1024) for i in range(8)])
    return PackedBatch(
        tokens_S=tokens,
        positions_S=torch.arange(1024).repeat(8),
        segment_lengths=lengths,
        segment_samples=[SampleRef("x", i) for i in range(8)],
        segment_tasks=["x"] * 8,
        target_positions_Q=targets - 1,
        target_ids_Q=tokens[targets],
        target_weights_Q=torch.ones(targets.numel()),
        target_segments_Q=torch.arange(8).repeat_interleave(90),
        image_positions_N=images,
        num_tiles=8,
        tiles_TCHW=torch.randint(0, 256, (8, 3, 336, 336), generator=generator, dtype=torch.uint8),
    )


if __name__ == "__main__":
    main()
