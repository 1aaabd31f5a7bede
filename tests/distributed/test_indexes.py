"""Every rank reads the same data, or all of them say which ranks do not."""

from __future__ import annotations

import os
from pathlib import Path
from unittest.mock import patch

import pytest

from megavlm.config.schema import Recipe
from megavlm.data.index import build_index
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage


def indexes_of(recipe: Recipe, elsewhere: dict[int, str], ranks_a_machine: int = 4) -> tuple[str, list[str]]:
    """What this rank hears when some ranks' data lie elsewhere, and the order in which ranks began to build."""
    import torch.distributed as dist

    from megavlm.data.tokenizer import load_tokenizer
    from megavlm.training.indexes import IndexMismatch, build_on_rank_zero_first

    rank, began = dist.get_rank(), Path(recipe.run.dir) / "began"
    if rank in elsewhere:
        pages = recipe.data.sources["pages"].model_copy(update={"path": elsewhere[rank]})
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"sources": {**recipe.data.sources, "pages": pages}})})

    def noted(*args, **kwargs):  # type: ignore[no-untyped-def]
        with began.open("a") as file:
            file.write(f"{rank}\n")
        return build_index(*args, **kwargs)

    tokenizer = load_tokenizer(recipe.data.tokenizer, recipe.data.image_token)
    local = {"LOCAL_RANK": str(rank % ranks_a_machine)}
    with patch("megavlm.training.indexes.build_index", noted), patch.dict(os.environ, local):
        try:
            indexes = build_on_rank_zero_first(recipe, recipe.stages[0], ["pages"], tokenizer)
            told = indexes["pages"].fingerprint
        except IndexMismatch as error:
            told = f"mismatch: {error}"
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
    dist.barrier()
    return told, began.read_text().split()


def recipe_in(tmp_path: Path, data_dir: Path) -> Recipe:
    return tiny_recipe(tmp_path, data_dir, [tiny_stage(mixture={"pages": 1})])


def test_a_rank_with_other_shards_is_named_by_all(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    answers = pool.run(indexes_of, recipe_in(tmp_path, data_dir), {2: str(data_dir / "multi"), 3: str(data_dir / "multi")}, 2, world_size=4)
    told = {text for text, _ in answers}
    assert len(told) == 1, "the same on every rank"
    (text,) = told
    assert text.startswith("mismatch") and "pages: ranks 0-1 " in text and ", ranks 2-3 " in text


def test_a_rank_that_cannot_read_is_named_by_all(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, data_dir)
    for broken, words in ((3, "rank 3: "), (2, "rank 2: "), (0, "")):
        answers = pool.run(indexes_of, recipe, {broken: str(tmp_path / "absent")}, 2, world_size=4)
        told = {text for text, _ in answers}
        assert len(told) == 1 and words in (text := told.pop()) and "absent" in text
        assert text.startswith("mismatch") == bool(broken), "rank 0's own error keeps its class"


def test_the_first_rank_of_each_machine_builds_before_the_others(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    answers = pool.run(indexes_of, recipe_in(tmp_path, data_dir), {}, 2, world_size=4)
    assert len({text for text, _ in answers}) == 1 and not answers[0][0].startswith("mismatch")
    order = answers[0][1]
    assert order[:2] == ["0", "2"] and sorted(order[2:]) == ["1", "3"]


@pytest.mark.parametrize(("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 8], "ranks 0-2, 8"), ([1, 3, 4], "ranks 1, 3-4")])
def test_ranks_are_named_in_runs(ranks: list[int], text: str) -> None:
    from megavlm.training.indexes import _named

    assert _named(ranks) == text
