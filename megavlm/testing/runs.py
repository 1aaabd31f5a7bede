"""A run's folder without its checkpoints, for tests of what loads one."""

from __future__ import annotations

from pathlib import Path

from megavlm.config.load import dump_recipe
from megavlm.config.schema import DataConfig, ModelConfig, PrecisionConfig, Recipe, RunConfig, SourceConfig, StageConfig
from megavlm.data.chat import TEMPLATES
from megavlm.data.tokenizer import train_sentencepiece


def write_tiny_run(folder: Path) -> Recipe:
    """Write a tokenizer and recipe.yaml of a model of some ten thousand large weights to `folder`."""
    tokenizer = train_sentencepiece(["What is this? A digit. " * 3], folder / "tokenizer.model", 300, TEMPLATES["megavlm"].special_tokens)
    small = {"num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 64}
    recipe = Recipe(
        run=RunConfig(dir=str(folder), device="cpu", seed=3),
        model=ModelConfig(
            init_std=0.25,
            vision={**small, "image_size_px": 16, "patch_size_px": 8, "hidden_size": 16},
            language={**small, "vocab_size": tokenizer.vocab_size, "hidden_size": 32, "max_positions": 256},
        ),
        precision=PrecisionConfig(dtype="fp32"),
        data=DataConfig(tokenizer=str(folder / "tokenizer.model"), sources={"a": SourceConfig(path="a")}),
        stages=[StageConfig(name="only", steps=1, mixture={"a": 1})],
    )
    dump_recipe(recipe, folder / "recipe.yaml")
    return recipe
