"""Training as users run it, through the whole route: some layers of Qwen3-8B's shape and InternViT-300M, on packs of 8192 tokens.

Weights are drawn on the device (on the CPU some billions take minutes) and no checkpoint is written; all else is the training loop.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from gpu.pictures import make_data
from gpu.runner import Place, Task, Unavailable

if TYPE_CHECKING:
    from megavlm.config.schema import Recipe

WARM_UP_STEPS = 3
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "training_local": {
        "bf16": {},
        "bf16, attention a call a segment": {"attention": "sdpa"},
        "fp8 tensorwise": {"fp8": "current", "fp8_backend": "scaled_mm"},
        "fp8 rowwise": {"fp8": "rowwise"},
    },
    "training_te": {
        "bf16": {},
        "fp8 current": {"fp8": "current", "fp8_backend": "transformer_engine"},
        "fp8 blockwise": {"fp8": "blockwise"},
    },
}
"""Section -> run -> its `precision` block. training_local hides Transformer Engine."""
# InternViT-300M and Qwen3-8B: https://huggingface.co/OpenGVLab/InternViT-300M-448px-V2_5, https://huggingface.co/Qwen/Qwen3-8B
ENCODER = {
    "patch_size_px": 14, "activation": "gelu", "norm_eps": 1e-6, "layer_scale": True, "class_token": True, "pre_norm": False,
    "patch_bias": True, "feature_layer": -1, "has_final_norm": False, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
LANGUAGE = {"qk_norm": True, "norm_eps": 1e-6, "rope_theta": 1e6}
LARGE: dict[str, Any] = {
    "vision": {"image_size_px": 448, "num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "ffn_hidden_size": 4096},
    "language": {
        "vocab_size": 151936, "num_layers": 4, "hidden_size": 4096, "num_attention_heads": 32, "num_query_groups": 8, "head_dim": 128,
        "ffn_hidden_size": 12288, "max_positions": 8192,
    },
}  # fmt: skip
TINY: dict[str, Any] = {
    "vision": {"image_size_px": 56, "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64},
    "language": {
        "vocab_size": 1536, "num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": 2, "head_dim": 16,
        "ffn_hidden_size": 128, "max_positions": 512,
    },
}  # fmt: skip


def tasks(section: str, place: Place) -> dict[str, Task]:
    return {name: partial(measure, section, name, place) for name in VARIANTS[section]}


def measure(section: str, name: str, place: Place) -> dict[str, Any]:
    """Train a variant; speed and memory of the steps behind the warm-up."""
    from megavlm.planner.precision import PrecisionError, choose_fp8
    from megavlm_kernels.packed_attention import machine_of

    machine = machine_of(place.device)
    if section == "training_te" and machine.transformer_engine is None:
        raise Unavailable("it needs a CUDA device" if place.tiny else "Transformer Engine is not installed, or does not load")
    steps = WARM_UP_STEPS + place.options.get("steps", 3 if place.tiny else 8)
    recipe = make_recipe(place, f"{section}-{name}".replace(" ", "-").replace(",", ""), steps, VARIANTS[section][name])
    try:
        backend = choose_fp8(recipe.model, recipe.precision, recipe.parallel, machine)
    except PrecisionError as error:
        raise Unavailable(str(error)) from error
    watch = _Watch(place.device)
    with watched(watch, place.device):
        records = train(recipe)
    assert len(records) == steps, f"{len(records)} steps were recorded instead of {steps}"
    peak = "section ceilings" if recipe.tracking.peak_tflops_per_rank is not None else "data sheet, or matmul of this CPU"
    found = {"fp8_backend": backend, "peak_from": peak, **figures(records, watch)}
    return {**found, "memory": memory(recipe, watch.peak_bytes, place.device)}


def train(recipe: Recipe) -> list[dict[str, Any]]:
    from megavlm.testing.recipes import train_and_read

    return train_and_read(recipe)


def make_recipe(place: Place, name: str, steps: int, precision: dict[str, Any], **blocks: dict[str, Any]) -> Recipe:
    """The benchmark's recipe on data that is made when it is first asked for; `blocks` replace whole blocks."""
    from megavlm.config.schema import Recipe

    data = Path(place.folder) / "data"
    make_data(data, *((60, (8, 30), (60, 200)) if place.tiny else (400, (80, 190), (320, 960))))
    size = TINY if place.tiny else LARGE
    language = {**size["language"], **LANGUAGE}
    if not place.tiny:
        language["num_layers"] = place.options.get("layers", language["num_layers"])
    ceiling = place.fact("ceilings", "matmul bf16", "tflops")
    values: dict[str, Any] = {
        "run": {"dir": str(Path(place.folder) / "runs" / name), "device": place.device, "deterministic": False, "num_ranks": 1},
        "model": {"vision": {**size["vision"], **ENCODER}, "projector": {"pixel_shuffle": 2}, "language": language},
        "precision": {"dtype": "bf16", **precision},
        "data": {
            "tokenizer": str(data / "tokenizer.model"),
            "sources": {"photos": {"path": str(data / "photos")}},
            "image": {"policy": "tiles", "max_tiles": 3, "thumbnail": True},
            "seq_len_tokens": 256 if place.tiny else 8192,
            "max_patches_per_pack": 10 * 16 if place.tiny else 20 * 1024,
            "pack_window_samples": 32 if place.tiny else 128,
            # Threads: processes would each take seconds to start, in every run.
            "num_workers": 1 if place.tiny else 6,
        },
        "stages": [
            {
                "name": "all", "steps": steps, "packs_per_step": 2 if place.tiny else 4, "mixture": {"photos": 1.0},
                "vision": {"train": "full"}, "optimizer": {"lr": 1e-4}, "schedule": {"kind": "constant", "warmup_steps": 2},
            }
        ],
        "tracking": {"mlflow": False, "num_sample_pictures": 0, "peak_tflops_per_rank": ceiling},
    }  # fmt: skip
    return Recipe.model_validate({**values, **blocks})


class _Watch:
    """Clock and memory behind the warm-up."""

    def __init__(self, device: str) -> None:
        self._device, self._steps = device, 0
        self.begin_s = self.end_s = 0.0
        self.peak_bytes: int | None = None

    def step_done(self) -> None:
        import torch

        self._steps += 1
        if self._device == "cuda":
            torch.cuda.synchronize()
            if self._steps == WARM_UP_STEPS:
                torch.cuda.reset_peak_memory_stats()
            self.peak_bytes = torch.cuda.max_memory_allocated()
        if self._steps == WARM_UP_STEPS:
            self.begin_s = time.perf_counter()
        self.end_s = time.perf_counter()


@contextmanager
def watched(watch: _Watch, device: str) -> Iterator[None]:
    """The training loop tells `watch` of every step, writes no checkpoint, and draws weights on the GPU."""
    import torch

    from megavlm.models import init
    from megavlm.training.loop import _StageRun

    one_step = _StageRun._one_step

    def step(self: Any, show_pictures: bool) -> None:
        one_step(self, show_pictures)
        watch.step_done()

    drawn = {"Generator": partial(torch.Generator, device=device)}
    drawn |= {name: partial(getattr(torch, name), device=device) for name in ("randn", "zeros", "ones")}
    with ExitStack() as stack:
        stack.enter_context(patch.object(_StageRun, "_one_step", step))
        stack.enter_context(patch.object(_StageRun, "_save", autospec=True))
        stack.enter_context(patch.object(init, "torch", SimpleNamespace(**drawn)))
        yield


def figures(records: list[dict[str, Any]], watch: _Watch) -> dict[str, Any]:
    """Rates over the wall time from the last step of the warm-up to the last step, waiting and records included."""
    seconds, timed = watch.end_s - watch.begin_s, records[WARM_UP_STEPS:]
    parts = {part: statistics.mean(record["time_s"][part] for record in timed) for part in timed[0]["time_s"]}
    tflops = sum(record["tflops"] * record["step_time_s"] for record in timed) / seconds
    # `mfu` of a record is its TFLOP/s over the peak that the recipe names: the measured ceiling.
    peaks = [record["tflops"] / record["mfu"] for record in timed]
    return {
        "steps": len(timed),
        "step_s": seconds / len(timed),
        "tokens_per_s": sum(record["useful_tokens"] for record in timed) / seconds,
        "tflops": tflops,
        "mfu": tflops / statistics.mean(peaks),
        "peak_tflops": statistics.mean(peaks),
        "pack_fill": statistics.mean(record["pack_fill"] for record in timed),
        "tiles_a_step": statistics.mean(record["tiles"] for record in timed),
        "target_share": sum(record["target_tokens"] for record in timed) / sum(record["useful_tokens"] for record in timed),
        "parts_s": {part: round(value, 5) for part, value in parts.items() if value},
        "losses": [record["loss"] for record in records],
    }


def memory(recipe: Recipe, peak_bytes: int | None, device: str) -> dict[str, Any]:
    """The allocator's peak against the planner's prediction."""
    from megavlm.planner.memory import estimate_memory
    from megavlm.topology.grid import RankGrid

    grid = RankGrid.from_config(recipe.parallel, 1)
    own = (recipe.model, recipe.stages[0], recipe.data, grid, recipe.parallel, recipe.precision)
    predicted = estimate_memory(*own, device=device)[0]
    return {
        "predicted_bytes": predicted.total_bytes,
        "parameters": predicted.num_parameters,
        "peak_bytes": peak_bytes,
        "peak_over_predicted": None if peak_bytes is None else peak_bytes / predicted.total_bytes,
    }
