"""Training in a process of its own, as tests on a GPU do it, on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from megavlm.testing.own_process import run_python, train_apart
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read


def test_trains_as_a_rank_does(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    own = train_apart(tiny_recipe(tmp_path / "own", data_dir, [tiny_stage(steps=2)]))
    (records,) = pool.run(train_and_read, tiny_recipe(tmp_path / "rank", data_dir, [tiny_stage(steps=2)]), world_size=1)
    assert len(own.records) == 2 and own.peak_bytes == 0
    assert own.losses == [record["loss"] for record in records]
    assert own.of("step") == [1, 2]


def test_tells_why_a_run_failed(data_dir: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", data_dir, [tiny_stage(steps=2)], model={"language": {"vocab_size": 8}})
    with pytest.raises(RuntimeError, match=r"exit code 1:[\s\S]*vocab_size is 8: raise it"):
        train_apart(recipe)


def test_imports_what_the_tests_can() -> None:
    assert "done" in run_python("-c", "import megavlm, megavlm_kernels, megavlm_launchers; print('done')")
    with pytest.raises(RuntimeError, match="exit code 3"):
        run_python("-c", "raise SystemExit(3)")
