"""One thing after the other that breaks: the run ends in time, leaves nobody behind, and goes on as if nothing had been."""

from __future__ import annotations

import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.hung_disk import can_hang
from megavlm.testing.matrix.faults import DAMAGES, FAULTS, LONG, SAVE_EVERY, STEPS, Damage, Fault, canary, recipe_of
from megavlm.testing.matrix.run import FaultyRun, can_mount
from megavlm.testing.matrix.table import Figures
from megavlm.testing.recipes import assert_same_records

END_S = 200.0
"""More than a start and all steps take on a busy machine."""


@pytest.fixture(scope="module")
def long_run(
    data_dir: Path, tmp_path_factory: pytest.TempPathFactory, long_uninterrupted: Callable[[int], list[dict[str, Any]]]
) -> Iterator[FaultyRun]:
    """One run that one fault after the other happens to, started anew after each."""
    long_uninterrupted(1)  # now: the run that it is compared with must not take the processor from this one
    folder = tmp_path_factory.mktemp("long")
    with FaultyRun(folder, recipe_of(folder, data_dir, LONG)) as run:
        yield run


def same_losses(records: list[dict[str, Any]], reference: list[dict[str, Any]]) -> None:
    """Bit for bit, and no step twice."""
    assert [r["step"] for r in records] == [r["step"] for r in reference]
    assert [(r["loss"], r["grad_norm"]) for r in records] == [(r["loss"], r["grad_norm"]) for r in reference]


def first_new_step(run: FaultyRun, *overrides: str, num_ranks: int = 2) -> tuple[int, float]:
    """Start again. Returns (the step that it goes on from, seconds to the first step behind it)."""
    start = time.monotonic()
    run.start(*overrides, num_ranks=num_ranks)
    run.wait_until(lambda: run.resumed_at is not None, "it says where it goes on")
    resumed = run.resumed_at
    assert resumed is not None
    run.wait_until(lambda: run.step > resumed or resumed == STEPS, "a step behind it")
    return resumed, time.monotonic() - start


def go_on(run: FaultyRun, *overrides: str, num_ranks: int = 2) -> tuple[int, float]:
    """The same, and to the end."""
    resumed, seconds = first_new_step(run, *overrides, num_ranks=num_ranks)
    assert run.wait(END_S) == 0, run.output[-3000:]
    assert not run.orphans()
    return resumed, seconds


def break_it(run: FaultyRun, fault: Fault) -> dict[str, Any]:
    """Let it happen to a run that trains, until all of it has ended."""
    complete = run.saved_step
    fault.inject(run)
    start = time.monotonic()
    code = run.wait(max(60.0, fault.detect_s))
    detected = time.monotonic() - start
    assert code in fault.codes, f"exit code {code}\n{run.output[-3000:]}"
    assert detected <= fault.detect_s, f"{detected:.1f} s until the end"
    assert not run.orphans()
    assert not run.damage_of_latest()
    assert re.search(fault.says, run.output), run.output[-3000:]
    return {"complete": complete, "last": run.step, "code": code, "detect_s": detected}


def recovered(fault: Fault, broken: dict[str, Any], resumed: int, resume_s: float) -> dict[str, Any]:
    """It went on from the newest checkpoint. Returns the fault's row."""
    assert resumed >= broken["complete"], f"step {broken['complete']} was saved, and it went on from {resumed}"
    lost = broken["last"] - resumed
    assert lost == 0 or not fault.saves, f"{broken['last']} steps were made, and it went on from {resumed}"
    row = {"what": fault.what, "code": broken["code"], "detect_s": broken["detect_s"], "resume_s": resume_s, "goal_s": fault.goal_s}
    return {**row, "lost": lost, "loss": "bit-exact"}


def marked(faults: list[Fault]) -> list[Any]:
    """Slow but for one. Those that happen to one and the same run, all that have a goal among them, are alone on the machine."""
    return [
        pytest.param(fault, id=fault.name, marks=[pytest.mark.slow] * (not fault.quick) + [pytest.mark.timed] * (not fault.is_apart))
        for fault in faults
    ]


@pytest.mark.parametrize("fault", marked([fault for fault in FAULTS if not fault.is_apart]))
def test_a_run_survives(
    fault: Fault, long_run: FaultyRun, tmp_path: Path, long_uninterrupted: Callable[[int], list[dict[str, Any]]], figures: Figures
) -> None:
    if fault.hangs and not can_hang(tmp_path):
        pytest.skip("this process may not mount a file system of FUSE")
    run = long_run
    if run.process is None:
        run.start()
    run.wait_until(lambda: run.saved_step > 0, "the first save")
    run.wait_for_step(run.step + random.randrange(2, 2 + SAVE_EVERY))
    broken = break_it(run, fault)
    resumed, resume_s = first_new_step(run)
    row = recovered(fault, broken, resumed, resume_s)
    run.wait_for_step(broken["last"] + 1)
    records = run.records()
    same_losses(records, long_uninterrupted(len(records)))
    figures[fault.name] = row


@pytest.mark.parametrize("fault", marked([fault for fault in FAULTS if fault.is_apart]))
def test_a_run_that_was_made_for_it_survives(
    fault: Fault, data_dir: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]], figures: Figures
) -> None:
    if fault.mounts and not can_mount(tmp_path):
        pytest.skip("this process may not mount a file system")
    with FaultyRun(tmp_path, recipe_of(tmp_path, data_dir)) as run:
        if fault.prepare is not None:
            fault.prepare(run)
        run.start(*fault.overrides, bad_steps=fault.bad_steps)
        run.wait_for_step(fault.at_step)
        broken = break_it(run, fault)
        if fault.mend is not None:
            fault.mend(run)
        row = recovered(fault, broken, *go_on(run))
        same_losses(run.records(), uninterrupted)
    figures[fault.name] = row


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES, ids=[damage.name for damage in DAMAGES])
def test_a_damaged_checkpoint_is_left_for_the_one_before(
    damage: Damage, data_dir: Path, tmp_path: Path, stopped: Path, uninterrupted: list[dict[str, Any]], figures: Figures
) -> None:
    shutil.copytree(stopped / "run", tmp_path / "run")
    with FaultyRun(tmp_path, recipe_of(tmp_path, data_dir)) as run:
        newest = run.newest()
        damage.harm(newest)
        resumed, resume_s = go_on(run)
        assert resumed == SAVE_EVERY, f"it went on from step {resumed}"
        assert not canary(newest).exists()
        if damage.says:
            assert newest.name in run.output and re.search(damage.says, run.output), run.output[-3000:]
        same_losses(run.records(), uninterrupted)
    figures[damage.name] = {"what": damage.what, "resume_s": resume_s, "lost": SAVE_EVERY, "loss": "bit-exact"}


@pytest.mark.slow
def test_the_only_checkpoint_is_damaged(data_dir: Path, tmp_path: Path, stopped: Path) -> None:
    """It must not begin at the beginning as if there had been nothing."""
    shutil.copytree(stopped / "run", tmp_path / "run")
    with FaultyRun(tmp_path, recipe_of(tmp_path, data_dir)) as run:
        while (path := run.checkpoints / f"{2 * SAVE_EVERY:08d}-all").exists() or len(list(run.checkpoints.glob("0*"))) > 1:
            shutil.rmtree(path)
        DAMAGES[0].harm(run.newest())
        run.start()
        assert run.wait(END_S) == 2
        assert "Traceback" not in run.output and "changed since it was written" in run.output, run.output[-3000:]
        assert "holds no good checkpoint to go on from" in run.output, run.output[-3000:]
        assert len(run.records()) == 2 * SAVE_EVERY


@pytest.mark.slow
def test_another_layout_in_the_middle_of_a_run(
    data_dir: Path, tmp_path: Path, uninterrupted: list[dict[str, Any]], figures: Figures
) -> None:
    with FaultyRun(tmp_path, recipe_of(tmp_path, data_dir)) as run:
        run.start("parallel.tensor=2", "run.max_steps=5")
        assert run.wait(END_S) == 0, run.output[-3000:]
        assert go_on(run, "parallel.pipeline=2", "run.max_steps=9")[0] == 5
        resumed, seconds = go_on(run)
        assert resumed == 9
        assert_same_records(run.records(), uninterrupted)
    figures["another layout"] = {"what": "TP2, then PP2, then DP2", "resume_s": seconds, "lost": 0, "loss": "1e-5"}
