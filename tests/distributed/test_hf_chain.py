"""The whole chain on somebody else's model: Hugging Face folder -> train (init.from_hf) -> export -> Hugging Face's logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.config.schema import InitConfig, ParallelConfig
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read


def make_folder(vision: str, text: str, folder: Path) -> None:
    """A random LLaVA with the demonstration's page size and vocabulary, weights large enough for position mistakes to show."""
    from megavlm.checkpoint.hf.config import quiet_transformers

    tf = quiet_transformers()
    tf.utils.logging.disable_progress_bar()
    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape = {**width, "image_size": 48, "patch_size": 8}
    encoder = tf.CLIPVisionConfig(**shape) if vision == "clip" else tf.SiglipVisionConfig(**shape)
    language_class = {"llama": tf.LlamaConfig, "qwen2": tf.Qwen2Config}[text]
    language = language_class(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    config = tf.LlavaConfig(
        vision_config=encoder,
        text_config=language,
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
        tie_word_embeddings=False,
    )
    torch.manual_seed(5)
    model = tf.LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.copy_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)


def model_block(folder: Path) -> dict[str, Any]:
    from megavlm.checkpoint.hf import config_from_hf

    return config_from_hf(folder).model_dump()


def export_and_verify(run_dir: Path, folder: Path) -> tuple[bool, float]:
    """(every tensor equal, largest logit difference against Hugging Face's class)."""
    from megavlm.checkpoint.hf import export_hf
    from megavlm.checkpoint.hf.verify import verify
    from megavlm.parallel.context import enter_grid

    export_hf(run_dir, folder)
    result = verify(run_dir, folder, enter_grid(ParallelConfig(), torch.device("cpu"), 0))
    return not result.unequal, result.max_abs_logit_difference


@pytest.mark.parametrize(("vision", "text"), [("clip", "llama"), ("siglip", "qwen2")])
def test_import_train_export(vision: str, text: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    pool.run(make_folder, vision, text, tmp_path / "hf")
    block = pool.run(model_block, tmp_path / "hf")[0]
    curves = {}
    for name, (world_size, parallel) in {"TP1": (1, {}), "TP2": (2, {"tensor": 2}), "PP2": (2, {"pipeline": 2})}.items():
        run_dir = tmp_path / name
        recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=3)], model=block, parallel=parallel)
        recipe = recipe.model_copy(update={"init": InitConfig(from_hf=str(tmp_path / "hf"))})
        records = pool.run(train_and_read, recipe, world_size=world_size)[0]
        curves[name] = [r["loss"] for r in records]
        assert curves[name] == pytest.approx(curves["TP1"], rel=1e-5)
        equal, difference = pool.run(export_and_verify, run_dir, tmp_path / f"{name}-hf")[0]
        assert equal
        assert difference <= 1e-4
    assert curves["TP1"][0] != curves["TP1"][-1]
