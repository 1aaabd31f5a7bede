"""Real runs on a real SLURM: a rank is killed, the time limit comes, a node dies, the controller is away. The losses stay as they were."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from megavlm.config.exits import Exit
from megavlm.config.load import dump_recipe
from megavlm.testing.matrix.faults import KILL_GOAL_S
from megavlm.testing.matrix.table import Figures
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.slurm import SlurmCluster, missing_programs
from megavlm.tracking.metrics import read_metrics
from tests.integration.test_train_command import megavlm

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=f"no SLURM here: {', '.join(missing_programs())} missing")
STEPS, SAVED_EVERY = 60, 10
LOST_AFTER_S = 10
"""SLURM's SlurmdTimeout here; its default is 300."""
SAVED: dict[str, Any] = {"every_steps": SAVED_EVERY}
LAST = f"{STEPS:08d}-{tiny_stage(steps=STEPS)['name']}"


def until(true: Callable[[], bool], what: Callable[[], str], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


class Run:
    """One that was submitted with `megavlm launch`."""

    def __init__(self, cluster: SlurmCluster, folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cluster, self.dir = cluster, folder / "a run"
        dump_recipe(tiny_recipe(self.dir, data_dir, [tiny_stage(steps=STEPS)], checkpoint=SAVED), folder / "recipe.yaml")
        facts = {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1, "exclusive": False, "memory_per_node": None, "time": "10"}
        (folder / "cluster.yaml").write_text(yaml.safe_dump(facts))
        monkeypatch.setenv("MEGAVLM_JOBS", str(folder / "jobs"))
        monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
        done = megavlm("launch", str(folder / "recipe.yaml"), "--on", "slurm", "--cluster", str(folder / "cluster.yaml"))
        assert done.returncode == 0, done.stderr
        (self.job,) = (json.loads(path.read_text())["id"] for path in (folder / "jobs").glob("*.json"))

    def log(self) -> str:
        return "".join(path.read_text() for path in (self.dir / "slurm").glob("*.log")) or self.cluster.run("scontrol", "show", "job")

    def step(self) -> int:
        return max((record["step"] for record in read_metrics(self.dir)), default=0) if (self.dir / "metrics.jsonl").exists() else 0

    def reaches(self, step: int) -> None:
        until(lambda: self.step() >= step, self.log)

    def says(self, words: str, timeout_s: float = 120) -> None:
        until(lambda: words in self.log(), self.log, timeout_s)

    def goes_on(self, last: int, start: int) -> dict[str, Any]:
        """Until the first new step of the `start`-th restart of the training, `last` having been made before it. Returns what it cost."""
        began = time.monotonic()
        until(lambda: len(self.resumed()) >= start, self.log)
        resumed = self.resumed()[start - 1]
        self.reaches(resumed + 1)
        return {"resume_s": time.monotonic() - began, "lost": last - resumed, "loss": "bit-exact"}

    def resumed(self) -> list[int]:
        """The step that each restart went on from."""
        return [int(step) for step in re.findall(r"resuming at step (\d+)", self.log())]

    def ranks(self) -> dict[int, psutil.Process]:
        """The job's training processes, by rank."""
        found = {}
        for process in psutil.process_iter(["environ", "cmdline"]):
            its, line = process.info["environ"] or {}, process.info["cmdline"] or []
            if its.get("SLURM_JOB_ID") == self.job and "megavlm.cli" in line and "SLURM_PROCID" in its and line[0] != "srun":
                found[int(its["SLURM_PROCID"])] = process
        return found

    def is_the_quiet_one(self, quiet: list[float]) -> None:
        """Every step is there once, with the loss of a run that nobody disturbed; no process is left."""
        records = read_metrics(self.dir)
        assert [record["step"] for record in records] == list(range(1, STEPS + 1))
        assert [record["loss"] for record in records] == quiet
        assert (self.dir / "checkpoints" / "latest").read_text().strip() == LAST
        assert not self.ranks()


@contextmanager
def under_way(folder: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch, nodes: int = 2) -> Iterator[tuple[SlurmCluster, Run]]:
    """A cluster, and a run on it that has saved once and gone on."""
    with SlurmCluster(nodes, lost_after_s=LOST_AFTER_S) as cluster:
        run = Run(cluster, folder, data_dir, monkeypatch)
        run.reaches(SAVED_EVERY + 1)
        until(lambda: (run.dir / "checkpoints" / "latest").exists(), run.log)  # written beside training: steps may overtake it
        yield cluster, run


@pytest.fixture(scope="module")
def quiet(pool: RankPool, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    recipe = tiny_recipe(tmp_path_factory.mktemp("quiet") / "run", data_dir, [tiny_stage(steps=STEPS)], checkpoint=SAVED)
    return [record["loss"] for record in pool.run(train_and_read, recipe, world_size=2)[0]]


@pytest.mark.slow
@pytest.mark.timed
def test_a_killed_rank_and_the_time_limit_change_no_loss(
    quiet: list[float], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures
) -> None:
    with under_way(tmp_path, data_dir, monkeypatch) as (cluster, run):
        run.ranks()[1].send_signal(signal.SIGKILL)
        began = time.monotonic()
        run.says("start 1 on")
        detect_s, last = time.monotonic() - began, run.step()
        killed = {"detect_s": detect_s, **run.goes_on(last, 1), "goal_s": KILL_GOAL_S, "code": 128 + signal.SIGKILL}
        cluster.run("scancel", "--batch", "--signal=USR2", run.job, check=False)  # what SLURM sends before the limit
        began = time.monotonic()
        cluster.wait(run.job, {"PENDING"})
        detect_s, last = time.monotonic() - began, run.step()
        cluster.start_requeued(run.job)
        warned = {"detect_s": detect_s, **run.goes_on(last, 2), "code": 128 + signal.SIGUSR2}
        assert warned["lost"] == 0, "the step in hand was saved"
        run.says(f"done at step {STEPS}")
        assert cluster.wait(run.job, {"COMPLETED"})["Restarts"] == "1"
        listed = json.loads(megavlm("jobs", "--json").stdout)
    assert [(entry["id"], entry["state"], entry["step"], entry["checkpoint"]) for entry in listed] == [(run.job, "COMPLETED", STEPS, LAST)]
    run.is_the_quiet_one(quiet)
    figures["SLURM, killed rank"] = {"what": "SLURM: rank 1 killed; the job's script starts the ranks again", **killed}
    figures["SLURM, time limit"] = {"what": "SLURM: its warning before the time limit; the job goes back into the queue", **warned}


@pytest.mark.slow
def test_a_dead_node_is_replaced(
    quiet: list[float], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures
) -> None:
    """Its daemon, its steps and its ranks are gone at one moment, as with a lost machine; a third node takes its place."""
    with under_way(tmp_path, data_dir, monkeypatch, nodes=3) as (cluster, run):
        first = cluster.state(run.job)["NodeList"]
        dead = int(run.ranks()[1].environ()["SLURMD_NODENAME"].removeprefix("node"))
        cluster.kill_machine(dead)
        began = time.monotonic()
        until(lambda: cluster.state(run.job)["Restarts"] == "1", lambda: run.log() + str(cluster.state(run.job)), 90)
        detect_s, last = time.monotonic() - began, run.step()
        cluster.start_requeued(run.job, without=dead)
        cost = {"detect_s": detect_s, **run.goes_on(last, 1)}
        run.says(f"done at step {STEPS}")
        found = cluster.wait(run.job, {"COMPLETED"})
        assert found["NodeList"] != first
    run.is_the_quiet_one(quiet)
    what = f"SLURM: a node dies, which SLURM is to notice after {LOST_AFTER_S} s; another takes its place"
    figures["SLURM, dead node"] = {"what": what, **cost}


@pytest.mark.slow
def test_a_controller_that_was_away_changes_nothing(
    quiet: list[float], data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figures: Figures
) -> None:
    with under_way(tmp_path, data_dir, monkeypatch) as (cluster, run):
        cluster.kill("slurmctld")
        run.reaches(run.step() + SAVED_EVERY)
        cluster.start_controller()
        run.says(f"done at step {STEPS}")
        assert cluster.wait(run.job, {"COMPLETED"})["Restarts"] == "0"
    assert "start 1" not in run.log()
    run.is_the_quiet_one(quiet)
    what = "SLURM: the controller killed, and started again ten steps later"
    figures["SLURM, controller"] = {"what": what, "code": int(Exit.DONE), "lost": 0, "loss": "bit-exact"}


def test_a_grid_that_does_not_divide_is_refused_before_it_is_submitted(data_dir: Path, tmp_path: Path) -> None:
    dump_recipe(tiny_recipe(tmp_path / "run", data_dir, [tiny_stage()], parallel={"tensor": 2}), tmp_path / "recipe.yaml")
    done = megavlm("launch", str(tmp_path / "recipe.yaml"), "--on", "slurm", "--nodes", "1", "--gpus-per-node", "3", "--dry-run")
    assert done.returncode == 2 and "3 ranks" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
