"""A question about pictures is cut, counted and laid out as the training sample was, under every picture policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megavlm.data.chat import Chat
from megavlm.data.index import build_index
from megavlm.data.materialise import Materialiser
from megavlm.data.prompt import prompt_batch
from megavlm.data.tokenizer import load_tokenizer
from megavlm.data.types import PackPlan, SampleRef
from megavlm.inference.prompts import make_prompt
from megavlm.planner.flops import VisionWork
from megavlm.testing.recipes import tiny_recipe, tiny_stage

IMAGES: dict[str, dict[str, Any]] = {
    "fixed": {"fit": "pad"},
    "tiles": {"policy": "tiles", "max_tiles": 4, "thumbnail": True},
    "anyres": {"policy": "anyres"},
    "native": {"policy": "native", "max_tokens_per_sample": 60},
}


@pytest.mark.parametrize("policy", IMAGES)
def test_prompts_are_cut_as_training_samples_are(policy: str, data_dir: Path, tmp_path: Path) -> None:
    model = {"vision": {"image_size_px": 24}, "projector": {"image_newline": policy == "anyres"}}
    recipe = tiny_recipe(
        tmp_path,
        data_dir,
        [tiny_stage() | {"mixture": {"multi": 1.0}}],
        model=model,
        data={"image": IMAGES[policy], "seq_len_tokens": 1024},
    )
    tokenizer = load_tokenizer(recipe.data.tokenizer)
    chat = Chat(recipe.data.chat_template, tokenizer)
    index = build_index(recipe.data.sources["multi"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False)
    materialise = Materialiser(recipe, recipe.stages[0], {"multi": index}, tokenizer, needs_tiles=True)
    row = next(row for row in range(len(index)) if len(index.sample(row).images) > 1)
    sample = index.sample(row)
    work = VisionWork.total(grid.work for grid in index.grids(row))
    plan = PackPlan((SampleRef("multi", row),), (int(index.length_tokens[row]),), work, 0, 0.0)
    trained = materialise([plan])
    pictures = [index.image(row, i) for i in range(len(sample.images))]
    messages = [m.model_dump() for m in sample.messages]
    last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
    prompt = make_prompt(messages[:last], pictures, chat=chat, data=recipe.data, model=recipe.model)
    asked = prompt_batch([prompt], tokenizer.image_token_id, recipe.model)
    assert asked.tokens_S.tolist() == trained.tokens_S[: len(asked.tokens_S)].tolist()
    assert asked.num_tiles == trained.num_tiles and asked.tile_grids == trained.tile_grids
    for name in ("tiles_TCHW", "pixels_X", "feature_rows_N", "image_positions_N"):
        theirs, ours = getattr(trained, name), getattr(asked, name)
        assert (theirs is None) == (ours is None), name
        assert ours is None or torch.equal(ours, theirs), name
    if policy == "anyres":
        assert (asked.feature_rows_N == -1).any()
