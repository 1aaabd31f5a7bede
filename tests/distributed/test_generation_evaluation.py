"""Measuring gives the same answers on one rank, on two data-parallel ranks, on two tensor ranks, and on both."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.checkpoint.hf import TokenIds, config_to_hf
from megavlm.config.schema import ModelConfig, ParallelConfig
from megavlm.data.chat import Chat
from megavlm.data.demo import make_demo
from megavlm.data.tokenizer import load_tokenizer
from megavlm.evaluation.held_out import evaluate, folder_sources
from megavlm.evaluation.questions import EvaluationError
from megavlm.evaluation.results import EvaluationResult
from megavlm.inference.load import load_for_inference
from megavlm.testing.pool import RankError, RankPool

PAGE_PX = 48


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(random Hugging Face model, data)."""
    import transformers

    model_folder, data = tmp_path_factory.mktemp("hf"), tmp_path_factory.mktemp("demo")
    make_demo(data, seed=1, num_train=8, num_held_out=16, page_px=PAGE_PX, num_workers=1)
    tokenizer = load_tokenizer(data / "tokenizer.model")
    small = {"num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 64}
    model = ModelConfig(
        vision={**small, "image_size_px": PAGE_PX, "patch_size_px": 8, "hidden_size": 32},
        language={**small, "vocab_size": tokenizer.vocab_size, "hidden_size": 48, "max_positions": 512},
    )
    torch.manual_seed(0)
    hf = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(**config_to_hf(model, TokenIds(image=tokenizer.image_token_id)))
    )
    with torch.no_grad():
        for name, parameter in hf.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.25 + ("norm" in name and name.endswith("weight")))
    hf.save_pretrained(model_folder)
    tokenizer.save_hf(model_folder, Chat("megavlm", tokenizer).jinja())
    return model_folder, data


def rank_result(model: Path, sources: list[Path], layout: dict[str, Any], out: Path | None, **options: Any) -> EvaluationResult:
    """What one rank gets."""
    loaded = load_for_inference(model, parallel=ParallelConfig(**layout), device="cpu")
    return evaluate(
        loaded,
        sources=folder_sources(sources, "heldout"),
        samples_per_task=2,
        batch_size=5,
        out=out,
        progress=False,
        **options,
    )


def test_the_same_answers_in_every_layout(pool: RankPool, folders: tuple[Path, Path], tmp_path: Path) -> None:
    model, data = folders
    sources = [data / "pages", data / "multi", data / "text"]
    (alone,) = pool.run(rank_result, model, sources, {}, None)
    assert len({a.prediction for a in alone.answers}) > 10
    for world_size, layout in ((2, {}), (2, {"tensor": 2}), (4, {"tensor": 2})):
        out = tmp_path / f"{world_size}-{len(layout)}"
        for result in pool.run(rank_result, model, sources, layout, out, world_size=world_size):
            assert result == alone, (world_size, layout)
        assert len((out / "predictions.jsonl").read_text().splitlines()) == len(alone.answers)


def test_a_mistake_reaches_every_rank(pool: RankPool, folders: tuple[Path, Path]) -> None:
    model, data = folders
    with pytest.raises(RankError, match=EvaluationError.__name__):
        pool.run(rank_result, model, [data / "pages"], {}, None, world_size=2, tasks=["singing"], timeout_s=60)
