"""New tokens a second: megavlm's generation beside Hugging Face's `generate`, the same weights and prompts, greedy, on this machine.

    python benchmarks/generate.py [--rounds 5] [--out benchmarks/results/generate.json]

A random LLaVA (CLIP, Llama) is written once and loaded by both. Prompts have 24 to 200 tokens of text, every second one a picture of 64
visual tokens; each answer has 64 tokens. Batches of 1 and 8; Hugging Face gets its batch padded on the left, as its documentation says.

CPU seconds of the process, since the machine may be shared; the two take turns in each round, each one's best round counts. Both must give
the same tokens, or the script fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from megavlm.checkpoint.hf import config_from_hf, load_hf
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.config.schema import ParallelConfig, PrecisionConfig
from megavlm.data.prompt import Prompt
from megavlm.inference.generate import generate
from megavlm.models.vlm import VisionLanguageModel
from megavlm.parallel.context import ParallelContext, enter_grid, start_process_group
from megavlm.tracking.environment import environment_report

NEW_TOKENS, IMAGE_TOKEN = 64, 3
SIZES: dict[str, dict[str, int]] = {
    "34M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4},
    "110M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 4},
}


def hf_model(size: dict[str, int], folder: Path) -> Any:
    """Write a random model, and return it."""
    tf = quiet_transformers()
    config = tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=4, image_size=112, patch_size=14
        ),
        text_config=tf.LlamaConfig(**size, vocab_size=16000, max_position_embeddings=2048),
        image_token_index=IMAGE_TOKEN,
    )
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.05)
    model.save_pretrained(str(folder))
    return model


def prompts_of(batch: int) -> list[Prompt]:
    """Unequal prompts; every second one begins with a picture."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(batch):
        text = torch.randint(4, 16000, (24 + 22 * i,), generator=generator).tolist()
        if i % 2:
            made.append(Prompt(text))
            continue
        tile = torch.randint(0, 256, (1, 3, 112, 112), generator=generator, dtype=torch.uint8)
        made.append(Prompt([text[0], *[IMAGE_TOKEN] * 64, *text[1:]], tile))
    return made


def hf_inputs(prompts: list[Prompt], vision: Any) -> dict[str, torch.Tensor]:
    """One left-padded batch."""
    longest = max(len(p.ids) for p in prompts)
    ids = torch.tensor([[0] * (longest - len(p.ids)) + list(p.ids) for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p.ids)) + [1] * len(p.ids) for p in prompts])
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (vision.image_mean, vision.image_std))
    tiles = torch.cat([p.tiles_TCHW for p in prompts if p.tiles_TCHW is not None])
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": (tiles / 255 - mean) / std}


def compare(size: str, batch: int, rounds: int, ctx: ParallelContext) -> dict[str, Any]:
    """Both sides' best CPU seconds for the whole batch, and tokens a second."""
    with tempfile.TemporaryDirectory() as folder:
        hf = hf_model(SIZES[size], Path(folder))
        model = config_from_hf(folder)
        ours = VisionLanguageModel(model, PrecisionConfig(dtype="fp32"), ParallelConfig(), ctx)
        load_hf([ours], folder, model, ctx)
    prompts = prompts_of(batch)
    inputs = hf_inputs(prompts, model.vision)
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 0}

    def run_ours() -> list[list[int]]:
        return generate(ours, prompts, max_new_tokens=NEW_TOKENS, stop_ids=[], image_token_id=IMAGE_TOKEN)

    def run_theirs() -> list[list[int]]:
        with torch.no_grad():
            return hf.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :].tolist()

    assert run_ours() == run_theirs(), "the two give other tokens"
    seconds: dict[str, list[float]] = {"megavlm": [], "hugging_face": []}
    for _ in range(rounds):
        for name, run in (("megavlm", run_ours), ("hugging_face", run_theirs)):
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "model": size,
        "batch": batch,
        "tokens_per_cpu_second": {name: round(batch * NEW_TOKENS / value, 1) for name, value in best.items()},
        "ratio": round(best["hugging_face"] / best["megavlm"], 3),
        "cpu_seconds": {name: [round(v, 3) for v in values] for name, values in seconds.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    start_process_group(torch.device("cpu"), 600)
    ctx = enter_grid(ParallelConfig(), torch.device("cpu"), seed=0)
    results = []
    for size in SIZES:
        for batch in (1, 8):
            results.append(compare(size, batch, arguments.rounds, ctx))
            print(json.dumps({k: v for k, v in results[-1].items() if k != "cpu_seconds"}), flush=True)
    report = {"command": " ".join(["python", *sys.argv]), "threads": torch.get_num_threads(), "results": results}
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report | {"environment": environment_report()}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
