"""Losses that are not numbers, and spikes: skipped, rolled back or the end, on every layout, against runs that never saw the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from megavlm.checkpoint.resume import PassedOver
from megavlm.config.schema import Recipe
from megavlm.testing.faults import NAN, bad_steps, without_data_of
from megavlm.testing.in_rank import in_rank
from megavlm.testing.marks import slow_unless
from megavlm.testing.pool import RankError, RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.tracking.metrics import read_metrics
from megavlm.training.faults import tell_passed_over
from megavlm.training.incidents import IncidentLog
from megavlm.training.state import RunState

Records = list[dict[str, Any]]
STEPS = 6
FP16 = {"dtype": "fp16", "loss_scale": {"initial": 256.0, "window_steps": 2}}


def recipe_of(run_dir: Path, data_dir: Path, steps: int = STEPS, **blocks: Any) -> Recipe:
    return tiny_recipe(run_dir, data_dir, [tiny_stage(steps=steps)], **blocks)


def train_badly(recipe: Recipe, factors: dict[int, float], data_rank: int = 0) -> Records:
    with bad_steps(factors, data_rank=data_rank, microbatch=1):
        return train_and_read(recipe)


def train_without(recipe: Recipe, data_steps: set[int]) -> Records:
    with without_data_of(data_steps):
        return train_and_read(recipe)


def incidents(run_dir: Path) -> Records:
    return read_metrics(run_dir, "incidents.jsonl")


def numbers(records: Records) -> list[tuple[float, float, Any]]:
    return [(record["loss"], record["grad_norm"], record["lr"]) for record in records]


LAYOUTS: list[tuple[int, dict[str, Any], dict[str, Any]]] = [
    (2, {}, {}),
    (2, {"zero": 1}, {}),
    (2, {"tensor": 2}, {}),
    (2, {"pipeline": 2}, {}),
    (2, {"zero": 1}, FP16),
    (2, {"pipeline": 2}, FP16),
    (2, {"zero": 1, "overlap_grad_reduce": True, "overlap_param_gather": True}, {"dtype": "bf16"}),
    (2, {"zero": 3}, {"dtype": "bf16"}),
]


@pytest.mark.parametrize(
    ("world_size", "parallel", "precision"),
    slow_unless(LAYOUTS, lambda w, parallel, precision: not parallel),
)
def test_a_skipped_step_leaves_no_trace(
    world_size: int, parallel: dict[str, Any], precision: dict[str, Any], pool: RankPool, data_dir: Path, tmp_path: Path
) -> None:
    """Weights, optimizer, schedule and loss scale go on as if the step's data had never been there: bit for bit."""
    blocks = {"parallel": parallel, **({"precision": precision} if precision else {})}
    recipe = recipe_of(tmp_path / "run", data_dir, faults={"on_nonfinite": "skip"}, **blocks)
    records = pool.run(train_badly, recipe, {2: NAN}, world_size=world_size)[0]
    truth = pool.run(train_without, recipe_of(tmp_path / "truth", data_dir, **blocks), {2}, world_size=world_size)[0]
    assert records[2]["skipped"] == "nonfinite" and "grad_norm" not in records[2]
    assert numbers(records[:2] + records[3:]) == numbers(truth[:-1])
    assert [r.get("skipped_steps", 0) for r in records] == [r.get("skipped_steps", 0) for r in truth[:2]] + [1] * (STEPS - 2)
    if precision == FP16:
        assert [r["loss_scale"] for r in records[:2] + records[3:]] == [r["loss_scale"] for r in truth[:-1]]
    (incident,) = incidents(tmp_path / "run")
    assert (incident["kind"], incident["action"], incident["step"], incident["data_step"]) == ("nonfinite", "skip", 3, 2)


def test_the_bad_microbatch_is_named(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Two data ranks with two microbatches each: of the four the one that was spoilt, with its samples."""
    recipe = recipe_of(tmp_path, data_dir, faults={"on_nonfinite": "skip"})
    pool.run(train_badly, recipe, {1: NAN}, 1, world_size=2)
    (incident,) = incidents(tmp_path)
    (suspect,) = incident["suspects"]
    assert (suspect["data_rank"], suspect["microbatch"]) == (1, 1)
    for source, rows in suspect["samples"].items():
        assert set(rows) <= set(incident["samples"][source])
    assert sum(map(len, suspect["samples"].values())) < sum(map(len, incident["samples"].values()))


@pytest.mark.parametrize(
    ("world_size", "parallel"), slow_unless([(2, {}), (2, {"zero": 1}), (2, {"tensor": 2}), (2, {"pipeline": 2})], lambda w, p: "zero" in p)
)
def test_a_rollback_goes_on_behind_the_bad_data(
    world_size: int, parallel: dict[str, Any], pool: RankPool, data_dir: Path, tmp_path: Path
) -> None:
    """Bad data in step 4, a checkpoint at step 2: steps 3 on are made again, from what follows the bad data."""
    blocks = {"parallel": parallel, "checkpoint": {"every_steps": 2}}
    recipe = recipe_of(tmp_path / "run", data_dir, faults={"on_nonfinite": "rollback"}, **blocks)
    records = pool.run(train_badly, recipe, {3: NAN}, world_size=world_size)[0]
    truth = pool.run(train_without, recipe_of(tmp_path / "truth", data_dir, **blocks), {2, 3}, world_size=world_size)[0]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert numbers(records) == numbers(truth)
    (incident,) = incidents(tmp_path / "run")
    assert (incident["action"], incident["step"], incident["to_step"]) == ("rollback", 4, 2)


@pytest.mark.slow
def test_a_rollback_takes_a_newer_checkpoint_of_the_nodes(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Bad data in step 6, a checkpoint on the node's own disk at step 4, and none in the run's folder yet."""
    blocks: dict[str, Any] = {"checkpoint": {"local": {"dir": str(tmp_path / "local"), "every_steps": 4}}}
    recipe = recipe_of(tmp_path / "run", data_dir, faults={"on_nonfinite": "rollback"}, **blocks)
    records = pool.run(train_badly, recipe, {5: NAN}, world_size=2)[0]
    truth = pool.run(train_without, recipe_of(tmp_path / "truth", data_dir), {4, 5}, world_size=2)[0]
    assert numbers(records) == numbers(truth)
    (incident,) = incidents(tmp_path / "run")
    assert (incident["step"], incident["to_step"]) == (6, 4)


@pytest.mark.slow
def test_a_rollback_without_a_checkpoint_goes_to_the_beginning_of_the_stage(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "run", data_dir, faults={"on_nonfinite": "rollback"})
    records = pool.run(train_badly, recipe, {1: NAN}, world_size=1)[0]
    truth = pool.run(train_without, recipe_of(tmp_path / "truth", data_dir), {0, 1}, world_size=1)[0]
    assert numbers(records) == numbers(truth)


def stop_after(recipe: Recipe, factors: dict[int, float], saves: int) -> None:
    """Train until the rollback is done and the run would save again; then the power fails."""
    from unittest.mock import patch

    from megavlm.training.loop import _StageRun

    save, left = _StageRun._save, [saves]

    def cut(self: Any, **named: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        save(self, **named)

    with patch.object(_StageRun, "_save", cut), bad_steps(factors, microbatch=1):
        try:
            train_and_read(recipe)
        except KeyboardInterrupt:
            return
    raise AssertionError("was to be cut off")


@pytest.mark.slow
def test_a_restart_does_not_meet_the_data_of_a_rollback_again(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """Killed behind the rollback and before the next checkpoint: the newest one still points at the bad data."""
    blocks: dict[str, Any] = {"checkpoint": {"every_steps": 2}, "faults": {"on_nonfinite": "rollback", "max_rollbacks": 1}}
    pool.run(stop_after, recipe_of(tmp_path / "run", data_dir, **blocks), {2: NAN}, 1, world_size=1)
    assert len(incidents(tmp_path / "run")) == 1
    records = pool.run(train_badly, recipe_of(tmp_path / "run", data_dir, **blocks), {2: NAN}, world_size=1)[0]
    truth = pool.run(train_without, recipe_of(tmp_path / "truth", data_dir), {2}, world_size=1)[0]
    assert numbers(records) == numbers(truth)
    assert len(incidents(tmp_path / "run")) == 1


@pytest.mark.parametrize("action", ["skip", pytest.param("rollback", marks=pytest.mark.slow)])
def test_a_spike_is_seen(action: str, pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """A loss a thousand times as high in a quarter of the batch; the window of medians is full by then, and carried over a resume."""
    faults = {"on_spike": action, "spike_window_steps": 4, "loss_spike_factor": 3.0}
    blocks = {"faults": faults, "checkpoint": {"every_steps": 3}}
    pool.run(train_badly, recipe_of(tmp_path / "run", data_dir, 8, run={"max_steps": 4}, **blocks), {1: 1e3, 5: 1e3}, world_size=2)
    # Nothing is a spike before the window is full: step 2 was trained on.
    assert not (tmp_path / "run" / "incidents.jsonl").exists()
    records = pool.run(train_badly, recipe_of(tmp_path / "run", data_dir, 8, **blocks), {1: 1e3, 5: 1e3}, world_size=2)[0]
    (incident,) = incidents(tmp_path / "run")
    assert (incident["kind"], incident["action"], incident["data_step"]) == ("spike", action, 5)
    assert incident["loss"] > 3 * incident["medians"]["loss"] and incident["grad_norm"] is not None
    assert [r.get("skipped") for r in records] == [None] * 5 + (["spike"] if action == "skip" else [None]) + [None] * 2


def test_more_than_the_budget_ends_the_run(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, data_dir, faults={"on_nonfinite": "skip", "max_skips": 1}, checkpoint={"every_steps": 1})
    with pytest.raises(
        RankError, match=r"step 4 .*loss nan.*faults\.on_nonfinite=skip, 2 of them within 1000 steps, and faults\.max_skips=1"
    ):
        pool.run(train_badly, recipe, {1: NAN, 3: NAN}, world_size=1)
    assert [i["action"] for i in incidents(tmp_path)] == ["skip", "stop"]
    # A restart meets the same data and ends alike: the budget is remembered.
    with pytest.raises(RankError, match=r"step 4 .*2 of them"):
        pool.run(train_badly, recipe, {1: NAN, 3: NAN}, world_size=1)
    # A larger one lets it pass, and a skip that was met before counts once.
    wider = recipe_of(tmp_path, data_dir, faults={"on_nonfinite": "skip", "max_skips": 2}, checkpoint={"every_steps": 1})
    assert len(pool.run(train_badly, wider, {1: NAN, 3: NAN}, world_size=1)[0]) == STEPS


def test_stop_is_before_the_update(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    """The recipe's default: the last checkpoint is from before, and the message says where to look."""
    recipe = recipe_of(tmp_path, data_dir, checkpoint={"every_steps": 1})
    with pytest.raises(RankError, match=r"step 3 \(stage all\): loss nan.*rows .*faults\.on_nonfinite=stop.*incidents\.jsonl"):
        pool.run(train_badly, recipe, {2: NAN}, world_size=2)
    assert json.loads((tmp_path / "checkpoints" / "00000002-all" / "state.json").read_text())["step"] == 2
    assert not (tmp_path / "checkpoints" / "00000003-all").exists()


@in_rank
def test_torn_lines_are_passed_over_and_budgets_count_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "incidents.jsonl").write_text('{"kind": "spike", "acti')
    log = IncidentLog(tmp_path, has_resumed=False)
    assert log.incidents == []
    for step, data_step, action in ((5, 4, "skip"), (5, 4, "skip"), (7, 6, "skip"), (8, 7, "rollback"), (40, 39, "skip")):
        log.add({"kind": "nonfinite", "action": action, "stage": "all", "step": step, "data_step": data_step, "to_step": 4})
    again = IncidentLog(tmp_path, has_resumed=False)
    assert [i["step"] for i in again.incidents] == [5, 5, 7, 8, 40]
    new = {"action": "skip", "stage": "all", "step": 9, "data_step": 8}
    # Step 5 was met twice on the same data, step 40 is far away, step 8 was something else.
    assert log.number_with(new, 10) == again.number_with(new, 10) == 3
    assert again.number_with(new, 3) == 2 and again.number_with(new | {"stage": "other"}, 10) == 1


@in_rank
def test_incidents_of_an_earlier_run_in_the_folder_move_nothing(tmp_path: Path) -> None:
    """Its checkpoints are gone, and with them what its steps and cursors meant; a restart of the run itself knows them still."""
    log = IncidentLog(tmp_path, has_resumed=False)
    cursor = {"step": 5}
    log.add({"kind": "spike", "action": "rollback", "stage": "all", "step": 5, "data_step": 4, "to_step": 0, "cursor": cursor})
    again = IncidentLog(tmp_path, has_resumed=False)
    assert again.cursor_behind("all", RunState()) == cursor and again.numbers() == {"spike": 1}
    shutil.rmtree(tmp_path / "checkpoints")
    anew = IncidentLog(tmp_path, has_resumed=False)
    assert anew.cursor_behind("all", RunState()) is None and anew.numbers() == {}
    assert anew.number_with({"action": "rollback", "stage": "all", "step": 5, "data_step": 9}, 100) == 1
    anew.add({"kind": "spike", "action": "skip", "stage": "all", "step": 7, "data_step": 6})
    assert [i["step"] for i in IncidentLog(tmp_path, has_resumed=True).incidents] == [7] and len(incidents(tmp_path)) == 2


@in_rank
def test_checkpoints_that_were_passed_over_are_counted_over_restarts(tmp_path: Path) -> None:
    recipe, told = recipe_of(tmp_path, tmp_path), Mock()
    state = RunState(step=4, stage_index=1, warnings=[PassedOver("damaged_checkpoint", "not used")])  # at the end of the last stage
    for number in (1, 2):
        log = IncidentLog(tmp_path, has_resumed=True)
        tell_passed_over(recipe, state, told, log)
        assert IncidentLog(tmp_path, has_resumed=True).numbers() == {"damaged_checkpoint": number}
    told.incident.assert_called_with("damaged_checkpoint", 4, "not used")
    assert [(i["step"], i["stage"], i["text"]) for i in incidents(tmp_path)] == [(4, "all", "not used")] * 2


OLD_LINE = '{"kind": "spike", "action": "rollback", "stage": "all", "step": 5, "data_step": 4, "to_step": 0, "cursor": {"step": 5}}\n'


@in_rank
def test_lines_from_before_runs_had_names_are_of_the_run_that_resumes(tmp_path: Path) -> None:
    """Bad data that it left out must not come back with a new version of the program; another run's must not be left out by this one."""
    file = tmp_path / "incidents.jsonl"
    file.write_text(OLD_LINE)
    for _ in range(2):  # a second restart, too
        log = IncidentLog(tmp_path, has_resumed=True)
        assert log.cursor_behind("all", RunState()) == {"step": 5} and log.numbers() == {"spike": 1}
    assert file.read_text() == OLD_LINE
    shutil.rmtree(tmp_path / "checkpoints")
    file.write_text(OLD_LINE + '{"kind": "spi')
    log = IncidentLog(tmp_path, has_resumed=False)
    assert log.cursor_behind("all", RunState()) is None and log.numbers() == {}
    again = IncidentLog(tmp_path, has_resumed=True)
    assert again.numbers() == {}, "what was not its own at its beginning is not its own after a restart"
    assert len(incidents(tmp_path)) == 1 and file.read_text().endswith('}\n{"kind": "spi')


def train_with_incidents(recipe: Recipe) -> dict[str, int]:
    """How many of each kind the run knew of when it started."""
    from unittest.mock import patch

    from megavlm.tracking.tracker import Tracker

    known: list[dict[str, int]] = []
    with patch.object(Tracker, "earlier_incidents", lambda self, numbers: known.append(dict(numbers))):
        train_and_read(recipe)
    (numbers,) = known
    return numbers


def test_a_run_that_goes_on_knows_lines_without_a_name(pool: RankPool, data_dir: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, data_dir, 2, run={"max_steps": 1})
    assert pool.run(train_with_incidents, recipe) == [{}]
    (tmp_path / "incidents.jsonl").write_text(OLD_LINE)
    assert pool.run(train_with_incidents, recipe_of(tmp_path, data_dir, 2)) == [{"spike": 1}]
