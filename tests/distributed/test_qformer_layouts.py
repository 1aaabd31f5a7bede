"""A Q-Former trains alike in every layout, with microbatches that have no picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import models, pre_tokenizers

from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import assert_same_records, tiny_recipe, tiny_stage, train_and_read

QFORMER = {"num_queries": 5, "num_layers": 3, "hidden_size": 24, "num_attention_heads": 4, "ffn_hidden_size": 40}
MODEL: dict[str, Any] = {
    "vision": {"feature_layer": -1, "final_norm": True, "keep_class_token": True},
    "projector": {"kind": "qformer", "num_layers": 1, "qformer": QFORMER},
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tensor": 2, "sequence": True}),
    "PP2": (2, {"pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "DP2+overlap": (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}),
}


INSTRUCTED = QFORMER | {"instruction": {"vocab_size": 64, "max_positions": 24}}


def train(pool: RankPool, run_dir: Path, data_dir: Path, world_size: int, words: Path | None, **blocks: Any) -> list[dict[str, Any]]:
    """BLIP-2, or with `words` (folder of the Q-Former's own tokenizer) InstructBLIP."""
    model = MODEL if words is None else MODEL | {"projector": MODEL["projector"] | {"qformer": INSTRUCTED}}
    data = {} if words is None else {"instruction_tokenizer": str(words)}
    recipe = tiny_recipe(run_dir, data_dir, [tiny_stage(steps=3)], model=model, data=data, **blocks)
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe, world_size=world_size)[0]
    return records


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of letters."""
    folder = tmp_path_factory.mktemp("words")
    fast = Fast(models.WordLevel({"[UNK]": 0} | {chr(97 + i): i + 1 for i in range(26)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast.save(str(folder / "tokenizer.json"))
    return folder


Runs = dict[bool, list[dict[str, Any]]]


@pytest.fixture(scope="session")
def one_rank(pool: RankPool, data_dir: Path, words: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """By whether the Q-Former reads an instruction."""
    base = tmp_path_factory.mktemp("qformer")
    return {reads: train(pool, base / str(reads), data_dir, 1, words if reads else None) for reads in (False, True)}


@pytest.mark.parametrize("reads", [False, True], ids=["BLIP-2", "InstructBLIP"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, reads: bool, pool: RankPool, data_dir: Path, words: Path, tmp_path: Path, one_rank: Runs) -> None:
    world_size, parallel = LAYOUTS[layout]
    records = train(pool, tmp_path, data_dir, world_size, words if reads else None, parallel=parallel)
    assert_same_records(records, one_rank[reads])
    for record, expected in zip(records, one_rank[reads], strict=True):
        assert record["tiles"] == expected["tiles"]


def test_instructions_change_what_is_learned(one_rank: Runs) -> None:
    for records in one_rank.values():
        assert records[-1]["loss"] < records[0]["loss"]
    assert one_rank[False][0]["loss"] != one_rank[True][0]["loss"]
