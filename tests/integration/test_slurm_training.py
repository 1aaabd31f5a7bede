"""A real run on a real SLURM of two nodes: a rank is killed, the time limit comes near, and the losses are those of a quiet run."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import yaml

from megavlm.config.load import dump_recipe
from megavlm.testing.pool import RankPool
from megavlm.testing.recipes import tiny_recipe, tiny_stage, train_and_read
from megavlm.testing.slurm import SlurmCluster, missing_programs
from megavlm.tracking.metrics import read_metrics
from tests.integration.test_train_command import megavlm

pytestmark = pytest.mark.skipif(bool(missing_programs()), reason=f"no SLURM here: {', '.join(missing_programs())} missing")
STEPS, SAVED_EVERY = 60, 10


def until(true: Callable[[], bool], what: Callable[[], str], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < end, what()
        time.sleep(0.1)


def ranks_of(job: str) -> dict[int, psutil.Process]:
    """The job's training processes, by rank."""
    found = {}
    for process in psutil.process_iter(["environ", "cmdline"]):
        its, line = process.info["environ"] or {}, process.info["cmdline"] or []
        if its.get("SLURM_JOB_ID") == job and "megavlm.cli" in line and "SLURM_PROCID" in its and line[0] != "srun":
            found[int(its["SLURM_PROCID"])] = process
    return found


@pytest.mark.slow
@pytest.mark.slow
def test_a_killed_rank_and_the_time_limit_change_no_loss(
    pool: RankPool, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, saved = [tiny_stage(steps=STEPS)], {"every_steps": SAVED_EVERY}
    quiet = pool.run(train_and_read, tiny_recipe(tmp_path / "quiet", data_dir, stage, checkpoint=saved), world_size=2)[0]
    run_dir = tmp_path / "a run"
    dump_recipe(tiny_recipe(run_dir, data_dir, stage, checkpoint=saved), tmp_path / "recipe.yaml")
    facts = {"nodes": 2, "gpus_per_node": 0, "ranks_per_node": 1, "exclusive": False, "memory_per_node": None, "time": "10"}
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(facts))
    (tmp_path / "slurm").mkdir()
    monkeypatch.setenv("MEGAVLM_JOBS", str(tmp_path / "jobs"))

    def log() -> str:
        return "".join(path.read_text() for path in (run_dir / "slurm").glob("*.log")) or cluster.run("scontrol", "show", "job")

    def step() -> int:
        return max((record["step"] for record in read_metrics(run_dir)), default=0) if (run_dir / "metrics.jsonl").exists() else 0

    with SlurmCluster(tmp_path / "slurm") as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.configuration))
        done = megavlm("launch", str(tmp_path / "recipe.yaml"), "--on", "slurm", "--cluster", str(tmp_path / "cluster.yaml"))
        assert done.returncode == 0, done.stderr
        (job,) = (json.loads(path.read_text())["id"] for path in (tmp_path / "jobs").glob("*.json"))

        until(lambda: step() > SAVED_EVERY, log)
        ranks_of(job)[1].send_signal(signal.SIGKILL)
        until(lambda: "start 1 on" in log(), log)
        before = step()
        until(lambda: step() > before, log)

        cluster.run("scancel", "--batch", "--signal=USR2", job, check=False)  # what SLURM sends before the limit
        cluster.start_requeued(job)
        until(lambda: f"done at step {STEPS}" in log(), log)
        assert cluster.wait(job, {"COMPLETED"})["Restarts"] == "1"
        listed = json.loads(megavlm("jobs", "--json").stdout)
    assert [(entry["id"], entry["state"], entry["step"], entry["checkpoint"]) for entry in listed] == [
        (job, "COMPLETED", STEPS, f"{STEPS:08d}-{stage[0]['name']}")
    ]
    assert not ranks_of(job), "no rank is left behind"
    records = read_metrics(run_dir)
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert [r["loss"] for r in records] == [r["loss"] for r in quiet]


def test_a_grid_that_does_not_divide_is_refused_before_it_is_submitted(data_dir: Path, tmp_path: Path) -> None:
    dump_recipe(tiny_recipe(tmp_path / "run", data_dir, [tiny_stage()], parallel={"tensor": 2}), tmp_path / "recipe.yaml")
    done = megavlm("launch", str(tmp_path / "recipe.yaml"), "--on", "slurm", "--nodes", "1", "--gpus-per-node", "3", "--dry-run")
    assert done.returncode == 2 and "3 ranks" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]
