"""Checkpoints on the nodes' own disks: pretend nodes, each with a folder of its own and one or two ranks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from megavlm.checkpoint import folders
from megavlm.config.exits import RESUME_NOTE_VARIABLE
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankError, RankPool
from megavlm.testing.recipes import assert_same_records, tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.tracker import Tracker
from megavlm.training import checkpointing
from megavlm.training.checkpointing import Checkpointer, local_run_dir
from megavlm.training.state import RunState

STEPS = 6


class Killed(Exception):
    """The job ends in the middle of a step."""


def train_on_nodes(
    root: Path,
    data_dir: Path,
    ranks_per_node: int,
    parallel: dict[str, Any],
    killed_in: int | None,
    *,
    disk: str = "node-{node}",
    steps: int = STEPS,
    waits: bool = True,
    mended_in: int | None = None,
    durable: int = 3,
    **changes: Any,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Train as a rank of a node with a disk, its own or one that all see; returns the records and what was said."""
    node = int(os.environ["RANK"]) // ranks_per_node
    local = {"dir": str(root / disk.format(node=node)), "every_steps": 1, "keep_last": 2} | changes
    blocks = {"parallel": parallel, "checkpoint": {"every_steps": durable, "asynchronous": False, "local": local}}
    recipe = tiny_recipe(root / "run", data_dir, [tiny_stage(steps=steps)], **blocks)
    said: list[str] = []
    original_step, original_begin = Tracker.step, Checkpointer.begin_local

    def step(self: Tracker, record: Any) -> None:
        original_step(self, record)
        if record["step"] == mended_in and node == 1:
            (root / "node-1").unlink()
        if record["step"] == killed_in:
            raise Killed

    def begin_local(self: Checkpointer, state: RunState) -> None:
        # Steps of milliseconds would leave every other one out.
        original_begin(self, state)
        outcome = self.wait(state)
        assert outcome is not None
        said.append(str(outcome.error))

    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, {"SLURM_NODEID": str(node), RESUME_NOTE_VARIABLE: str(root / "resumed")}))
        stack.enter_context(patch.object(Tracker, "message", lambda self, text: said.append(text)))
        stack.enter_context(patch.object(Tracker, "incident", lambda self, *what: said.append(f"{what[2]} [{what[0]}]")))
        stack.enter_context(patch.object(Tracker, "step", step))
        if waits:
            stack.enter_context(patch.object(Checkpointer, "begin_local", begin_local))
        return train_and_read(recipe), said


def own_folder(root: Path, node: int, disk: str = "node-{node}") -> Path:
    """The run's folder of a node on its disk."""
    (run,) = (root / disk.format(node=node)).iterdir()
    found = sorted(run.iterdir())
    return found[node % len(found)]


def local_folders(root: Path, node: int, disk: str = "node-{node}") -> list[str]:
    return [p.name for p in folders.named(own_folder(root, node, disk))]


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
    stop(pool, root, data_dir, LAYOUTS["DP2 ZeRO-1, two nodes"])
    return root


def stop(pool: RankPool, root: Path, data_dir: Path, layout: tuple[dict[str, Any], int, int], disk: str = "node-{node}") -> None:
    parallel, world_size, ranks = layout
    with pytest.raises(RankError, match="Killed"):
        pool.run(train_on_nodes, root, data_dir, ranks, parallel, 6, world_size=world_size, disk=disk)
    assert folders.latest(root / "run") == "00000003-all"
    for node in range(world_size // ranks):
        assert local_folders(root, node, disk) == ["00000004-all", "00000005-all"]


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
    stop(pool, tmp_path, data_dir, LAYOUTS[layout])
    answers = pool.run(train_on_nodes, tmp_path, data_dir, ranks, parallel, None, world_size=world_size)
    records, said = answers[0]
    assert any(text.startswith("resuming at step 5, stage all, from ") and "node-0" in text for text in said)
    assert (tmp_path / "resumed").read_text() == "5\n", "for a job's script, which sees no node's disk"
    assert_same_records(records, whole)
    assert not any((tmp_path / f"node-{n}").exists() and list((tmp_path / f"node-{n}").iterdir()) for n in range(world_size // ranks)), (
        "all done"
    )


def lose_a_node(root: Path) -> None:
    shutil.rmtree(root / "node-1")


def lose_the_newest_of_a_node(root: Path) -> None:
    shutil.rmtree(own_folder(root, 1) / "checkpoints" / "00000005-all")


def damage_the_newest_of_a_node(root: Path) -> None:
    shard = max((own_folder(root, 1) / "checkpoints" / "00000005-all").glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-2000] ^= 4
    shard.write_bytes(data)


def replace_a_node_by_another_save(root: Path) -> None:
    """A node comes back with its part of an attempt that was given up, at the same step."""
    folder = own_folder(root, 1) / "checkpoints" / "00000005-all"
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
    damaged = [text for text in said if "00000005-all is damaged" in text and "[damaged_checkpoint]" in text]
    assert len(damaged) == (1 if damage is damage_the_newest_of_a_node else 0)
    parts = [text for text in said if "00000005-all is not used: nothing of it is left on" in text]
    assert all("[incomplete_local_checkpoint]" in text for text in parts)
    assert len(parts) == (0 if damage in (damage_the_newest_of_a_node, begin_anew) else 1), "a part that is missing is told of"


def _place(root: Path, local: dict[str, Any]) -> str:
    recipe = tiny_recipe(root / "run", root, checkpoint={"local": local | {"every_steps": 1}})
    found = local_run_dir(recipe)
    assert found is not None
    return found.name


@pytest.mark.slow
def test_another_layout_takes_the_durable_tier(pool: RankPool, data_dir: Path, tmp_path: Path, whole: list[dict[str, Any]]) -> None:
    stop(pool, tmp_path, data_dir, LAYOUTS["DP2 ZeRO-1, two nodes"])
    records, said = pool.run(train_on_nodes, tmp_path, data_dir, 1, {"pipeline": 2}, None, world_size=2)[0]
    assert any(text.startswith("resuming at step 3, ") for text in said)
    assert_same_records(records, whole)


def test_a_node_without_room_is_told_of_once_and_tried_again(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Tried after steps 1 and 4, and after step 8, when there is room."""
    (tmp_path / "node-1").write_text("in the way")
    run = pool.run(train_on_nodes, tmp_path, data_dir, 1, {"zero": 1}, None, world_size=2, steps=11, waits=False, mended_in=6)
    records, said = run[0]
    assert len(records) == 11 and folders.latest(tmp_path / "run") == "00000011-all"
    told = [text for text in said if "rank 1 could not write" in text]
    assert len(told) == 1 and "Not a directory" in told[0] and "tries again after 2 steps, then more rarely" in told[0]
    again = [text for text in said if text.startswith("local checkpoints")]
    assert again == ["local checkpoints are written again, after 2 attempts that failed"]


# ----------------------------------------------------------------------------------------- one folder that all nodes see

SHARED = "disk"


def test_nodes_that_share_a_folder_keep_their_parts_apart(
    pool: RankPool, data_dir: Path, tmp_path: Path, whole: list[dict[str, Any]]
) -> None:
    layout = ({"pipeline": 2}, 2, 1)
    stop(pool, tmp_path, data_dir, layout, disk=SHARED)
    records, said = pool.run(train_on_nodes, tmp_path, data_dir, 1, {"pipeline": 2}, None, world_size=2, disk=SHARED)[0]
    assert any(text.startswith("resuming at step 5, ") and f"/{SHARED}/" in text for text in said)
    assert_same_records(records, whole)
    assert list((tmp_path / SHARED).iterdir()) == [], "all done"


def test_nodes_that_changed_places_take_the_durable_tier(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """What lies on the disk of the machine that was the second one is of no use to it as the first."""
    stop(pool, tmp_path, data_dir, ({"pipeline": 2}, 2, 1), disk=SHARED)
    one, two = own_folder(tmp_path, 0, SHARED), own_folder(tmp_path, 1, SHARED)
    one.rename(one.with_name("aside")), two.rename(one), one.with_name("aside").rename(two)
    _, said = pool.run(train_on_nodes, tmp_path, data_dir, 1, {"pipeline": 2}, None, world_size=2, disk=SHARED)[0]
    assert any(text.startswith("resuming at step 3, ") for text in said)


# ------------------------------------------------------------------------------------------------- tidying up on each node


def train_with_a_late_node(root: Path, data_dir: Path) -> list[str]:
    """The second node fails to name its part of step 5, a while after the first one has named its own; what the first then has."""
    node, seen = int(os.environ["RANK"]), []
    publish = folders.publish

    def late(unfinished: Path, path: Path) -> None:
        if node == 1 and path.name == "00000005-all":
            first = own_folder(root, 0)
            wait_until((first / "checkpoints" / path.name).is_dir)
            time.sleep(0.3)  # in which the first one would tidy up
            seen.extend(p.name for p in folders.named(first))
            raise OSError(errno.ENOSPC, "No space left on device")
        publish(unfinished, path)

    with patch.object(folders, "publish", late), suppress(Killed):
        train_on_nodes(root, data_dir, 1, {"zero": 1}, 6, keep_last=1)
    return seen


def wait_until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_older_one_stays_until_every_node_has_the_newer(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    seen = pool.run(train_with_a_late_node, tmp_path, data_dir, world_size=2)[1]
    assert seen == ["00000004-all", "00000005-all"]
    assert [local_folders(tmp_path, node) for node in (0, 1)] == [["00000004-all"]] * 2, "a part of a failed save goes"


def train_where_deleting_fails(root: Path, data_dir: Path) -> None:
    with patch.object(checkpointing, "prune_local", side_effect=AttributeError("a fault of the program")):
        train_on_nodes(root, data_dir, 1, {}, 3)


def test_a_part_is_good_though_older_ones_cannot_be_deleted(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="Killed"):
        pool.run(train_where_deleting_fails, tmp_path, data_dir)
    assert local_folders(tmp_path, 0) == ["00000001-all", "00000002-all"]


def test_what_other_machines_left_goes_before_the_first_save(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Of machines whose names were others, and of the time before nodes had folders of their own; not of other runs."""
    run = tmp_path / SHARED / _place(tmp_path, {"dir": str(tmp_path / SHARED)})
    old = [run / "checkpoints", run / "pod-7f" / "checkpoints", run.with_name("another-run") / "checkpoints"]
    for folder in old:
        (folder / "00000001-all").mkdir(parents=True)
    with pytest.raises(RankError, match="Killed"):
        pool.run(train_on_nodes, tmp_path, data_dir, 1, {"zero": 1}, 3, world_size=2, disk=SHARED)
    assert [folder.exists() for folder in old] == [False, False, True]
    assert [[path.name for path in folders.named(node)] for node in run.iterdir()] == [["00000001-all", "00000002-all"]] * 2


def train_with_slow_tidying(root: Path, data_dir: Path) -> list[list[str]]:
    """What lies on the node's disk when tidying up has taken two steps."""
    prune_local, seen, original, steps = checkpointing.prune_local, [], Tracker.step, [0]

    def step(self: Tracker, record: Any) -> None:
        original(self, record)
        steps.append(record["step"])

    def slow(run_dir: Path, *rest: Any) -> None:
        until, end = steps[-1] + 2, time.monotonic() + 1.5  # the last save is waited for: there are no more steps then
        while steps[-1] < until and time.monotonic() < end:
            time.sleep(0.01)
        seen.append(sorted(path.name for path in (run_dir / folders.CHECKPOINTS).iterdir() if path.is_dir()))
        prune_local(run_dir, *rest)

    with patch.object(checkpointing, "prune_local", slow), patch.object(Tracker, "step", step):
        train_on_nodes(root, data_dir, 2, {"zero": 1}, None, keep_last=1, steps=8, waits=False, durable=100)
    return seen


def test_the_next_save_begins_when_there_is_room(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """A disk with room for keep_last + 1 is enough, whichever rank of the node is the first to write."""
    seen = pool.run(train_with_slow_tidying, tmp_path, data_dir, world_size=2)[0]
    assert len(seen) >= 2 and max(map(len, seen)) == 2, seen
