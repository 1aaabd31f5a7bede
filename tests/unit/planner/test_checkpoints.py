"""What a dry run says of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint import random_states, store
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.config.schema import Recipe
from megavlm.planner.checkpoints import checkpoint_bytes, checkpoint_table
from megavlm.testing.in_rank import in_rank
from megavlm.testing.recipes import PROJECTOR_ONLY, tiny_recipe, tiny_stage
from megavlm.training.build import build_chunks, wrap_for_training
from megavlm.training.layout import stage_layout


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@in_rank
def test_the_size_is_that_of_the_files(dtype: str, tmp_path: Path, ctx: Any) -> None:
    """Within what stands around the values, which a model of tensors larger than these would not feel."""
    recipe = tiny_recipe(tmp_path / "run", tmp_path, [tiny_stage("all"), tiny_stage("some", **PROJECTOR_ONLY)], precision={"dtype": dtype})
    for stage in recipe.stages:
        layout = stage_layout(recipe.parallel, stage, recipe.model)
        model = wrap_for_training(build_chunks(recipe, stage, layout, ctx), recipe, stage, layout)
        path = store.save(tmp_path / f"00000001-{stage.name}", model.modules, model.optimizer, {}, ctx)
        reader = CheckpointReader(path)
        keys = [key for key in reader.entries if not key.startswith(random_states.PREFIX)]  # some 20 KB a rank
        written = sum(tensor.nbytes for tensor in map(reader.tensor, keys))
        assert abs(written - checkpoint_bytes(recipe)[stage.name]) < 0.02 * written


def test_what_is_said(tmp_path: Path) -> None:
    plain = tiny_recipe(tmp_path, tmp_path)
    assert "\n" not in checkpoint_table(plain, 2) and "at the end of each stage" in checkpoint_table(plain, 2)
    blocks = {
        "evaluation": {"sources": ["held_out"], "every_steps": 10},
        "checkpoint": {"every_steps": 7, "keep_every_steps": 70, "keep_best": 3, "local": {"dir": "/dev/shm/x", "every_steps": 2}},
    }
    said = checkpoint_table(tiny_recipe(tmp_path, tmp_path, **blocks), 2)
    for word in (
        "every 7 steps",
        "multiples of 70 steps",
        "the 3 of each stage with the lowest",
        "host memory a rank",
        "/dev/shm/x",
        "2 times",
    ):
        assert word in said


def test_the_best_need_a_measurement(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_best goes by the held-out loss: set evaluation.sources and evaluation.every_steps"):
        tiny_recipe(tmp_path, tmp_path, checkpoint={"keep_best": 1})
    assert isinstance(tiny_recipe(tmp_path, tmp_path), Recipe)
