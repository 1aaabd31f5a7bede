"""The memory that a run tells of, on a GPU: torch's own count, near the estimate for a model that is large enough to see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megavlm.testing.own_process import train_apart
from megavlm.testing.recipes import tiny_recipe, tiny_stage

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def test_the_run_tells_what_the_allocator_counted(data_dir: Path, tmp_path: Path) -> None:
    language = {"num_layers": 8, "hidden_size": 512, "ffn_hidden_size": 1536, "num_attention_heads": 8}
    recipe = tiny_recipe(
        tmp_path / "run", data_dir, [tiny_stage(steps=4, packs_per_step=2)], run={"device": "cuda", "deterministic": False},
        precision={"dtype": "bf16"}, model={"init_std": 0.02, "language": language}, data={"seq_len_tokens": 4096},
    )  # fmt: skip
    own = train_apart(recipe)
    memory = own.records[-1]["memory"]
    assert 0 < memory["peak_bytes"] <= min(own.peak_bytes, memory["reserved_bytes"])
    assert 0.6 * memory["estimated_bytes"] < memory["peak_bytes"] < 1.5 * memory["estimated_bytes"]
    (rank,) = json.loads((tmp_path / "run" / "ranks.json").read_text())["all"]
    assert rank["peak_bytes"] == memory["peak_bytes"] and rank["estimated_bytes"]["total"] == memory["estimated_bytes"]
