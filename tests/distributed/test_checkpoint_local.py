"""Checkpoints on the nodes' own disks: pretend nodes, each with a folder of its own and one or two ranks."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megavlm.checkpoint import folders
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankError, RankPool
from megavlm.testing.recipes import assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.tracker import Tracker
from megavlm.training.checkpointing import Checkpointer, local_run_dir
from megavlm.training.state import RunState

STEPS = 6


class Killed(Exception):
    """The job ends in the middle of a step."""


def train_on_nodes(
    root: Path, data_dir: Path, ranks_per_node: int, parallel: dict[str, Any], killed_in: int | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """Train as a rank of a node of its own disk; returns the records and what was said."""
    node = int(os.environ["RANK"]) // ranks_per_node
    local = {"dir": str(root / f"node-{node}"), "every_steps": 1, "keep_last": 2}
    blocks = {"parallel": parallel, "checkpoint": {"every_steps": 3, "asynchronous": False, "local": local}}
    recipe = tiny_recipe(root / "run", data_dir, [tiny_stage(steps=STEPS)], **blocks)
    said: list[str] = []
    original_step, original_begin = Tracker.step, Checkpointer.begin_local

    def step(self: Tracker, record: Any) -> None:
        original_step(self, record)
        if record["step"] == killed_in:
            raise Killed

    def begin_local(self: Checkpointer, state: RunState) -> None:
        # Steps of milliseconds would leave every other one out.
        original_begin(self, state)
        outcome = self.wait(state)
        assert outcome is not None
        said.append(str(outcome.error))

    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {"SLURM_NODEID": str(node)}))
        stack.enter_context(patch.object(Tracker, "message", lambda self, text: said.append(text)))
        stack.enter_context(patch.object(Tracker, "incident", lambda self, *what: said.append(what[2])))
        stack.enter_context(patch.object(Tracker, "step", step))
        stack.enter_context(patch.object(Checkpointer, "begin_local", begin_local))
        return train_and_read(recipe), said


def local_folders(root: Path, node: int) -> list[str]:
    (run,) = (root / f"node-{node}").iterdir()
    return [p.name for p in folders.named(run)]


LAYOUTS: dict[str, tuple[dict[str, Any], int, int]] = {
    "DP2 ZeRO-1, two nodes": ({"zero": 1}, 2, 1),
    "DP2, two nodes": ({}, 2, 1),
    "PP2, two nodes": ({"pipeline": 2}, 2, 1),
    "TP2 x ZeRO-1, two nodes of two": ({"tensor": 2, "zero": 1}, 4, 2),
    "ZeRO-3, two nodes": ({"zero": 3}, 2, 1),
    "PP2 x ZeRO-1, two nodes of two": ({"pipeline": 2, "zero": 1}, 4, 2),
    "ZeRO-1, one node": ({"zero": 1}, 2, 2),
}


@pytest.fixture(scope="module")
def stopped(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DP2 with ZeRO-1 on two nodes, killed after step 5: durable 3, local 4 and 5."""
    root = tmp_path_factory.mktemp("stopped")
    stop(pool, root, data_dir, "DP2 ZeRO-1, two nodes")
    return root


def stop(pool: RankPool, root: Path, data_dir: Path, layout: str) -> None:
    parallel, world_size, ranks = LAYOUTS[layout]
    with pytest.raises(RankError, match="Killed"):
        pool.run(train_on_nodes, root, data_dir, ranks, parallel, 6, world_size=world_size)
    assert folders.latest(root / "run") == "00000003-all"
    for node in range(world_size // ranks):
        assert local_folders(root, node) == ["00000004-all", "00000005-all"]


@pytest.fixture(scope="module")
def whole(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    recipe = tiny_recipe(tmp_path_factory.mktemp("whole"), data_dir, [tiny_stage(steps=STEPS)])
    records: list[dict[str, Any]] = pool.run(train_and_read, recipe)[0]
    return records


@pytest.mark.parametrize("layout", slow_unless(LAYOUTS, lambda layout: layout == "TP2 x ZeRO-1, two nodes of two"))
def test_a_run_goes_on_from_the_nodes_own_disks(
    layout: str, pool: RankPool, data_dir: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    """Each node reads nothing but its own folder, though its ranks need what others' copies would have saved for it."""
    parallel, world_size, ranks = LAYOUTS[layout]
    stop(pool, tmp_path, data_dir, layout)
    answers = pool.run(train_on_nodes, tmp_path, data_dir, ranks, parallel, None, world_size=world_size)
    records, said = answers[0]
    assert any(text.startswith("resuming at step 5, stage all, from ") and "node-0" in text for text in said)
    assert_same_records(records, whole)
    assert not any((tmp_path / f"node-{n}").exists() and list((tmp_path / f"node-{n}").iterdir()) for n in range(world_size // ranks)), (
        "all done"
    )


def lose_a_node(root: Path) -> None:
    shutil.rmtree(root / "node-1")


def lose_the_newest_of_a_node(root: Path) -> None:
    (run,) = (root / "node-1").iterdir()
    shutil.rmtree(run / "checkpoints" / "00000005-all")


def damage_the_newest_of_a_node(root: Path) -> None:
    (run,) = (root / "node-1").iterdir()
    shard = max((run / "checkpoints" / "00000005-all").glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-2000] ^= 4
    shard.write_bytes(data)


def replace_a_node_by_another_save(root: Path) -> None:
    """A node comes back with its part of an attempt that was given up, at the same step."""
    (run,) = (root / "node-1").iterdir()
    folder = run / "checkpoints" / "00000005-all"
    state, manifest = (json.loads((folder / name).read_text()) for name in (folders.STATE, folders.MANIFEST))
    folders.write_json(folder / folders.STATE, {**state, "save": "another"})
    manifest["files"][folders.STATE] = folders.checksum(folder / folders.STATE)
    folders.write_json(folder / folders.MANIFEST, manifest)


def begin_anew(root: Path) -> None:
    shutil.rmtree(root / "run")


@pytest.mark.parametrize(
    "damage, step",
    slow_unless(
        [
            (lose_a_node, 3),
            (lose_the_newest_of_a_node, 4),
            (damage_the_newest_of_a_node, 4),
            (replace_a_node_by_another_save, 4),
            (begin_anew, 0),
        ],
        lambda damage, step: damage not in (lose_a_node, lose_the_newest_of_a_node),
    ),
)
def test_a_part_that_is_missing_falls_back(
    damage: Any, step: int, pool: RankPool, data_dir: Path, tmp_path: Path, stopped: Path, whole: list[dict[str, Any]]
) -> None:
    """To the local one before it, or to the durable tier; and what another run left is no part of this one."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    local = {"dir": str(tmp_path / "node-0")}
    for node in (0, 1):  # the folder's name is the run's
        (run,) = (tmp_path / f"node-{node}").iterdir()
        run.rename(run.with_name(_place(tmp_path, local)))
    damage(tmp_path)
    records, said = pool.run(train_on_nodes, tmp_path, data_dir, 1, {"zero": 1}, None, world_size=2)[0]
    resumed = [text for text in said if text.startswith("resuming at")]
    assert [text.split(",")[0] for text in resumed] == ([f"resuming at step {step}"] if step else [])
    assert_same_records(records, whole)
    damaged = [text for text in said if "00000005-all is damaged" in text]
    assert len(damaged) == (1 if damage is damage_the_newest_of_a_node else 0)


def _place(root: Path, local: dict[str, Any]) -> str:
    recipe = tiny_recipe(root / "run", root, checkpoint={"local": local | {"every_steps": 1}})
    found = local_run_dir(recipe)
    assert found is not None
    return found.name


@pytest.mark.slow
def test_another_layout_takes_the_durable_tier(pool: RankPool, data_dir: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    stop(pool, tmp_path, data_dir, "DP2 ZeRO-1, two nodes")
    records, said = pool.run(train_on_nodes, tmp_path, data_dir, 1, {"pipeline": 2}, None, world_size=2)[0]
    assert any(text.startswith("resuming at step 3, ") for text in said)
    assert_same_records(records, whole)


def test_a_node_without_room_is_told_and_training_goes_on(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "node-1").write_text("in the way")
    records, said = pool.run(train_on_nodes, tmp_path, data_dir, 1, {"zero": 1}, None, world_size=2)[0]
    assert len(records) == STEPS and [p.name for p in folders.named(tmp_path / "run")] == ["00000003-all", "00000006-all"]
    told = [text for text in said if "rank 1 could not write" in text and "Not a directory" in text]
    assert told and (tmp_path / "node-0").is_dir()
