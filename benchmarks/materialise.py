"""Images a second and core from shard to batch: megavlm's Materialiser against Hugging Face's processors and against bare Pillow.

    python benchmarks/materialise.py [--images 16] [--rounds 5] [--out benchmarks/results/materialise.json]

Every route does the same work on the same samples, one at a time on one thread: 1.2-megapixel JPEGs (1280 x 960, quality 90) made from
scikit-learn's two real photographs, each with a conversation of two turns.

    megavlm            SampleIndex -> sample JSON, decode, resize, cut, tokenise, mask, check the mask, collate (uint8 out)
    hf, pil            the family's Hugging Face processor on Pillow: Image.open from memory, picture to normalised float32 tensor,
                       text with expanded placeholders to ids (the same tokenizer; no mask)
    hf, torchvision    the same on torchvision, where it is installed
    pillow alone       Image.open, convert, resize (bicubic) to the same pixels, to a tensor; no text, no crop, no normalisation

    fixed    CLIP / LLaVA-1.5: shortest side to 336, centre cut out
    tiles    InternVL: up to 12 tiles of 448 pixels and a thumbnail
    native   Qwen2-VL: the picture's own size

Seconds are CPU seconds of the process (the machine may be shared), routes take turns within each round, the median round counts.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megavlm.config.schema import Recipe
from megavlm.data.index import SampleIndex, build_index
from megavlm.data.materialise import Materialiser
from megavlm.data.shards import ShardWriter
from megavlm.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from megavlm.data.types import PackPlan, SampleRef
from megavlm.data.workers import WorkerPool, WorkerSetup
from megavlm.planner.flops import VisionWork
from megavlm.tracking.environment import environment_report

SIZE = (1280, 960)
QUESTION = "What is to be seen in this photograph? Name the things from left to right, their colours, and what may have happened before. "
ANSWER = "There is a large flower with many petals in front of dark leaves; further back a temple with a red roof stands in the trees. "
Route = Callable[[int], Any]


def photographs(count: int) -> list[bytes]:
    """JPEGs of 1.2 megapixels: crops of scikit-learn's photographs, enlarged, with the grain that a sensor adds."""
    from sklearn.datasets import load_sample_images

    rng, made = np.random.default_rng(7), []
    originals = [Image.fromarray(a) for a in load_sample_images().images]
    for i in range(count):
        left, top = (int(v) for v in rng.integers(0, 37, 2))
        crop = originals[i % 2].crop((left, top, left + 520, top + 390)).resize(SIZE, Image.Resampling.BICUBIC)
        noisy = np.asarray(crop, dtype=np.int16) + rng.normal(0, 4, (SIZE[1], SIZE[0], 3)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
        made.append(file.getvalue())
    return made


def conversation() -> list[dict[str, str]]:
    return [
        {"role": "user", "content": "<image>\n" + QUESTION},
        {"role": "assistant", "content": ANSWER * 2},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]


def prepare(folder: Path, jpegs: list[bytes]) -> None:
    """Shards, and a tokenizer that both sides read with the same library."""
    with ShardWriter(folder / "shards") as writer:
        for i, jpeg in enumerate(jpegs):
            writer.write(f"p{i}", {"task": "describe", "split": "train", "messages": conversation()}, [jpeg])
    special = ["<image>", "<|im_start|>", "<|im_end|>"]
    text = [QUESTION + "\n", ANSWER + "\n", *(f"{i} {w}\n" for i in range(200) for w in (QUESTION + ANSWER).split())]
    train_sentencepiece(text, folder / "tokenizer.model", 900, special).save_hf(folder / "tokenizer")


def recipe_of(folder: Path, policy: str) -> Recipe:
    side, patch, shuffle = {"fixed": (336, 14, 1), "tiles": (448, 14, 2), "native": (448, 14, 2)}[policy]
    image = {
        "fixed": {"policy": "fixed", "fit": "crop"},
        "tiles": {"policy": "tiles", "max_tiles": 12, "thumbnail": True},
        "native": {"policy": "native"},
    }[policy]
    vision = {"image_size_px": side, "patch_size_px": patch, "class_token": False, "num_layers": 2, "hidden_size": 64}
    return Recipe.model_validate(
        {
            "run": {"dir": str(folder / "run")},
            "model": {
                "vision": {**vision, "num_attention_heads": 4},
                "projector": {"pixel_shuffle": shuffle},
                "language": {"vocab_size": 1024},
            },
            "data": {
                "sources": {"a": {"path": str(folder / "shards")}},
                "tokenizer": str(folder / "tokenizer"),
                "chat_template": "chatml",
                "seq_len_tokens": 8192,
                "image": {**image, "decoder": "pillow"},
            },
            "stages": [{"name": "s", "steps": 1, "packs_per_step": 1, "mixture": {"a": 1}}],
        }
    )


def one_sample_packs(index: SampleIndex) -> list[PackPlan]:
    return [
        PackPlan(
            (SampleRef("a", row),),
            (int(index.length_tokens[row]),),
            VisionWork(int(index.num_tiles[row]), int(index.num_patches[row]), int(index.patch_pairs[row])),
            int(index.num_targets[row]),
            0.0,
        )
        for row in range(len(index))
    ]


def hf_route(policy: str, folder: Path, jpegs: list[bytes], backend: str, num_tokens: int) -> Route:
    """Picture processor and tokenizer of the family; placeholders are expanded in the text, as its processors do."""
    import transformers
    from transformers import AutoTokenizer

    suffix = "Pil" if backend == "pil" else ""
    name, options = {
        "fixed": ("CLIPImageProcessor", {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}),
        "tiles": ("GotOcr2ImageProcessor", {"size": {"height": 448, "width": 448}, "crop_to_patches": True, "max_patches": 12}),
        "native": ("Qwen2VLImageProcessor", {}),
    }[policy]
    processor = getattr(transformers, name + suffix)(**options)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", trust_remote_code=False)
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in conversation())

    def route(i: int) -> Any:
        pixels = processor(Image.open(io.BytesIO(jpegs[i])), return_tensors="pt")
        return pixels, tokenizer(text.replace("<image>", "<image>" * num_tokens), return_tensors="pt")

    return route


def pillow_route(jpegs: list[bytes], sizes: list[tuple[int, int]]) -> Route:
    def route(i: int) -> Any:
        picture = Image.open(io.BytesIO(jpegs[i])).convert("RGB")
        return [torch.from_numpy(np.array(picture.resize(size, Image.Resampling.BICUBIC))) for size in sizes]

    return route


def has_torchvision() -> bool:
    try:
        # The wheel of the package index is built for CUDA: without its operators the import stops at these, which nothing here calls.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
    except Exception:
        return False
    return True


def seconds_per_image(routes: dict[str, Route], count: int, rounds: int) -> dict[str, float]:
    """Median over rounds of CPU seconds an image."""
    taken: dict[str, list[float]] = {name: [] for name in routes}
    for route in routes.values():
        route(0)  # imports and caches
    for _ in range(rounds):
        for name, route in routes.items():
            start = time.process_time()
            for i in range(count):
                route(i)
            taken[name].append((time.process_time() - start) / count)
    return {name: statistics.median(values) for name, values in taken.items()}


def in_training_process(recipe: Recipe, index: SampleIndex, tokenizer: Tokenizer, packs: list[PackPlan], rounds: int) -> float:
    """CPU milliseconds an image that are left in the training process when a worker process does the work."""
    pool = WorkerPool(WorkerSetup(recipe, recipe.stages[0], {"a": index}, tokenizer.fingerprint, True, True))
    try:
        pool([packs[0]])
        start = time.process_time()
        for _ in range(rounds):
            for pack in packs:
                pool([pack])
        return 1e3 * (time.process_time() - start) / (rounds * len(packs))
    finally:
        pool.close()


def measure(policy: str, folder: Path, jpegs: list[bytes], rounds: int, backends: list[str]) -> dict[str, Any]:
    recipe = recipe_of(folder, policy)
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    index = build_index(recipe.data.sources["a"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False)
    materialise = Materialiser(recipe, recipe.stages[0], {"a": index}, tokenizer, needs_tiles=True)
    packs = one_sample_packs(index)
    batch = materialise([packs[0]])
    tokens = batch.image_positions_N.numel()
    if batch.tile_grids is not None:
        sizes = [(columns * 14, rows * 14) for rows, columns in batch.tile_grids]
    elif policy == "fixed":
        sizes = [(round(336 * SIZE[0] / SIZE[1]), 336)]
    else:
        across, down = 4, 3
        assert batch.num_tiles == across * down + 1
        sizes = [(across * 448, down * 448), (448, 448)]
    routes: dict[str, Route] = {"megavlm": lambda i: materialise([packs[i]])} | {
        f"hf, {b}": hf_route(policy, folder, jpegs, b, tokens) for b in backends
    }
    seconds = seconds_per_image(routes | {"pillow alone": pillow_route(jpegs, sizes)}, len(index), rounds)
    return {
        "policy": policy,
        "tiles_per_image": batch.num_tiles,
        "tokens_per_sample": int(index.length_tokens[0]),
        "images_per_core_second": {name: round(1 / s, 2) for name, s in seconds.items()},
        "cpu_ms_per_image_left_to_training_with_worker_processes": round(in_training_process(recipe, index, tokenizer, packs, rounds), 2),
        "times_as_fast_as": {name: round(s / seconds["megavlm"], 2) for name, s in seconds.items() if name != "megavlm"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backends = ["pil", *(["torchvision"] if has_torchvision() else [])]
    jpegs = photographs(options.images)
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), jpegs)
        rows = [measure(policy, Path(name), jpegs, options.rounds, backends) for policy in ("fixed", "tiles", "native")]
    for row in rows:
        print(json.dumps(row))
    result = {
        "command": "python benchmarks/materialise.py " + " ".join(a for a in sys.argv[1:] if not a.startswith("/")),
        "jpeg_bytes": int(np.mean([len(j) for j in jpegs])),
        "jpeg_pixels": SIZE,
        "torchvision": version("torchvision") if "torchvision" in backends else None,
        "results": rows,
        "environment": environment_report(),
    }
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
