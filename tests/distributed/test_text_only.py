"""A language model alone through the whole route: planned, trained in every layout, exported, talked to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch

from megavlm.checkpoint.hf import export_hf
from megavlm.checkpoint.hf.reading import quiet_transformers
from megavlm.checkpoint.hf.starting import complete
from megavlm.config.schema import Recipe
from megavlm.data.sample_index import SampleIndexError
from megavlm.data.tokenizer import load_tokenizer
from megavlm.inference.load import load_for_inference
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import PARITY_OPTIMIZER, assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.training.dryrun import dry_run

SCALED = {
    "qkv_bias": True,
    "rope_scaling": {
        "kind": "llama3",
        "parameters": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32},
    },
    "sliding_window_tokens": 9,
    "sliding_layers": [1, 2],
}
BY_LENGTH = {
    "rope_scaling": {
        "kind": "longrope",
        "parameters": {
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
            "original_max_position_embeddings": 24,
        },
    },
}
OPT = {
    "num_query_groups": 4,
    "activation": "relu",
    "gated_mlp": False,
    "norm": "layer_norm",
    "qkv_bias": True,
    "linear_bias": True,
    "positions": "learned",
    "position_offset": 2,
}
MODELS: dict[str, dict[str, Any]] = {"scaled, windows": SCALED, "by length": BY_LENGTH, "OPT": OPT}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2xVPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "PP3 ends alone": (3, {"pipeline": 3, "layers_per_stage": [0, 4, 0]}),
    "DP2+overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
    "CP2": (2, {"context": 2}),
}


def text_recipe(run_dir: Path, data_dir: Path, language: dict[str, Any], mixture: str = "text", **parallel: Any) -> Recipe:
    values = tiny_recipe(run_dir, data_dir, parallel=parallel).model_dump(mode="json")
    small = {"vocab_size": 512, "num_layers": 4, "hidden_size": 48, "num_attention_heads": 4, "num_query_groups": 2, "ffn_hidden_size": 96}
    text = small | {"tie_embeddings": True, "max_positions": 512} | language
    values["model"] = {"family": "causal_lm", "text_only": True, "init_std": 0.2, "language": text}
    values["init"] = {}
    stage = tiny_stage(steps=4) | {"objective": "text", "mixture": {mixture: 1.0}, "optimizer": PARITY_OPTIMIZER | {"lr": 3e-3}}
    values["stages"] = [{name: value for name, value in stage.items() if name not in ("vision", "projector")}]
    return Recipe.model_validate(values)


@pytest.fixture(scope="module")
def single_rank(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    base = tmp_path_factory.mktemp("text")
    return {n: pool.run(train_and_read, text_recipe(base / n, data_dir, language))[0] for n, language in MODELS.items()}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_trains_alike(
    layout: str, name: str, pool: RankPool, data_dir: Path, tmp_path: Path, single_rank: dict[str, list[dict[str, Any]]]
) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = pool.run(train_and_read, text_recipe(tmp_path, data_dir, MODELS[name], **parallel), world_size=world_size)[0]
    assert_same_records(records, single_rank[name])
    for record in records:
        assert record["tiles"] == 0


def test_it_learns(single_rank: dict[str, list[dict[str, Any]]]) -> None:
    for name, records in single_rank.items():
        assert records[-1]["loss"] < records[0]["loss"], name


def test_plan_without_training(data_dir: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    dry_run(text_recipe(tmp_path, data_dir, OPT), 1, lambda text: lines.append(str(text)))
    out = "\n".join(lines)
    assert "\nlanguage  " in out and "\nvision " not in out and "\nprojector" not in out


def test_sources_with_pictures_are_refused(data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(SampleIndexError, match="objective=text takes no pictures"):
        dry_run(text_recipe(tmp_path, data_dir, OPT, mixture="pages"), 1, lambda text: None)


def asked(path: str | Path) -> tuple[list[int], list[int]]:
    """A prompt and its answer."""
    loaded = load_for_inference(path, dtype="fp32")
    prompt = loaded.prompt("What is written here?")
    return list(prompt.ids), loaded.generate([prompt], max_new_tokens=12)[0]


@pytest.mark.parametrize("name", MODELS)
def test_train_export_ask(name: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """The run and its Hugging Face folder answer alike, and as transformers does."""
    recipe = text_recipe(tmp_path / "run", data_dir, MODELS[name])
    pool.run(train_and_read, recipe)
    pool.run(export_hf, recipe.run.dir, tmp_path / "hf")
    (ids, ours), exported = pool.run(asked, recipe.run.dir)[0], pool.run(asked, tmp_path / "hf")[0]
    assert (ids, ours) == exported
    theirs = quiet_transformers().AutoModelForCausalLM.from_pretrained(str(tmp_path / "hf"), dtype=torch.float32).eval()
    settings = {"do_sample": False, "max_new_tokens": len(ours), "min_new_tokens": len(ours), "eos_token_id": None}
    with torch.no_grad():
        assert theirs.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() == ours


def test_a_tokenizer_that_fills_the_vocabulary(pool: RankPool, tmp_path: Path) -> None:
    """Llama's has no image token, and its embedding no row for one."""
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", "what", "is", "written", "here", "?"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tf = quiet_transformers()
    config = tf.LlamaConfig(vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    tf.LlamaForCausalLM(config).save_pretrained(str(tmp_path))
    fast = tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}"
    fast.save_pretrained(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    assert ours.image_token_is_added and ours.num_rows(text_only=True) == len(words) == ours.num_rows(text_only=False) - 1
    ids, answer = pool.run(asked, tmp_path)[0]
    assert max(ids + answer) < len(words) and len(answer) > 0
    values = {"init": {"from_hf": str(tmp_path)}, "run": {"dir": "x"}, "stages": [], "data": {}}
    assert complete(values)["model"]["language"]["vocab_size"] == len(words)
