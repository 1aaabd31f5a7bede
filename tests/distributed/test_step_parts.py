"""Parts of a step's time and the profile, in real runs of one and more ranks."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megavlm.config.schema import Recipe
from megavlm.parallel.step_parts import wrap_collectives
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.timers import PARTS

BLOCKS: dict[str, dict[str, Any]] = {
    "one": {},
    "DP2": {"zero": 1},
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "CP2": {"context": 2},
}


def ranks_of(block: dict[str, Any]) -> int:
    return 2 if block else 1


def profiled(folder: Path, data: Path, block: dict[str, Any], stage_steps: int = 3, **profile: Any) -> Recipe:
    return tiny_recipe(folder, data, [tiny_stage(steps=stage_steps)], parallel=block, tracking={"profile": profile})


@pytest.mark.parametrize("name", BLOCKS)
def test_parts_add_up_to_the_step(pool: RankPool, tmp_path: Path, data_dir: Path, name: str) -> None:
    recipe = profiled(tmp_path / "run", data_dir, BLOCKS[name])
    records = pool.run(train_and_read, recipe, world_size=ranks_of(BLOCKS[name]))[0]
    assert len(records) == 3
    for record in records:
        times = record["time_s"]
        assert set(times) == set(PARTS)
        assert sum(times.values()) == pytest.approx(record["step_time_s"], abs=2e-3)
        expected = {"data", "copy", "language", "language_backward", "optimizer"}
        expected |= {"pipeline"} if name == "PP2" else {"communication"}
        if name != "PP2":  # rank 0 has no head there
            expected |= {"head"}
        if record["images"]:
            expected |= {"encoder", "projector", "encoder_backward"}
        # A rank may have no picture where several share them.
        missing = {part for part in expected if not times[part]}
        assert not missing or (name == "DP2" and missing <= {"encoder", "projector", "encoder_backward"}), missing
        assert record["hfu"] >= record["mfu"] > 0


@pytest.mark.parametrize("name", ["PP2", "DP2"])
def test_profile_of_two_ranks(pool: RankPool, tmp_path: Path, data_dir: Path, name: str) -> None:
    recipe = profiled(tmp_path / "run", data_dir, BLOCKS[name], first_step=2, steps=2, trace_ranks=[1])
    pool.run(train_and_read, recipe, world_size=2)
    folder = Path(recipe.run.dir) / "profile" / "all-step-2"
    assert {p.name for p in folder.iterdir()} == {"rank-1.trace.json.gz", "timeline.html", "timeline.png"}
    with gzip.open(folder / "rank-1.trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert "aten::mm" in names or "aten::addmm" in names
    page = (folder / "timeline.html").read_text()
    assert "Steps 2, 3" in page and "rank 0: data 0, stage 0" in page
    assert ("rank 1: data 0, stage 1" if name == "PP2" else "rank 1: data 1, stage 0") in page
    assert page.count("<line ") == 4, "two steps on each of two ranks"
    assert "language_backward, microbatch 1:" in page
    assert ("pipeline</th>" in page) is (name == "PP2")


def test_a_resumed_run_overwrites_no_profile(pool: RankPool, tmp_path: Path, data_dir: Path) -> None:
    recipe = profiled(tmp_path / "run", data_dir, {}, stage_steps=2, first_step=1, trace_ranks="none")
    pool.run(train_and_read, recipe)
    folder = Path(recipe.run.dir) / "profile"
    first = (folder / "all-step-1" / "timeline.html").read_text()
    # The run goes on from before the profiled step, as after a crash that came before a save.
    shutil.rmtree(Path(recipe.run.dir) / "checkpoints")
    pool.run(train_and_read, recipe)
    assert sorted(p.name for p in folder.iterdir()) == ["all-step-1", "all-step-1-2"]
    assert (folder / "all-step-1" / "timeline.html").read_text() == first


def test_off_means_off(pool: RankPool, tmp_path: Path, data_dir: Path) -> None:
    recipe = tiny_recipe(tmp_path / "run", data_dir, [tiny_stage(steps=1)], tracking={"step_parts": False})
    records = pool.run(train_and_read, recipe)[0]
    assert "time_s" not in records[0]
    assert not (Path(recipe.run.dir) / "profile").exists()


def wrap_twice() -> list[int]:
    """How deep each wrapped function is wrapped."""
    from megatron.core.pipeline_parallel import schedules

    wrap_collectives()
    first = schedules.backward_step
    wrap_collectives()
    return [int(schedules.backward_step is first), int(hasattr(first, "__wrapped__") and not hasattr(first.__wrapped__, "__wrapped__"))]


def test_wrapping_happens_once(pool: RankPool) -> None:
    assert pool.run(wrap_twice)[0] == [1, 1]
