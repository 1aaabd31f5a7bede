"""The tracking server dies, freezes or comes back under a run: training does not notice, and in the end the server has every point once."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megavlm.testing.matrix.faults import STEPS, recipe_of
from megavlm.testing.matrix.run import FaultyRun
from megavlm.testing.matrix.table import Figures
from megavlm.testing.mlflow_server import MlflowServer
from megavlm.testing.recipes import assert_same_records

EXIT_S = 20.0
"""From the last step to the end of the process, on a busy machine: the last checkpoint, the curves, and what MLflow is waited for."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with MlflowServer(tmp_path_factory.mktemp("mlflow")) as server:
        yield server


def blink(server: MlflowServer) -> None:
    server.freeze()
    time.sleep(1.0)
    server.thaw()


def nothing() -> None:
    """Neither broken nor mended: what the others' time to the end is beside."""


def points(server: MlflowServer, run: FaultyRun) -> list[int]:
    """Steps of the loss that the server has, in order."""
    from mlflow import MlflowClient

    make: Any = MlflowClient
    client = make(server.uri)
    (found,) = client.search_runs([e.experiment_id for e in client.search_experiments()], f"tags.mlflow.runName LIKE '%{run.folder.name}%'")
    return sorted(metric.step for metric in client.get_metric_history(found.info.run_id, "loss"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("answers", "nothing, with an MLflow server that answers"),
        ("killed", "the MLflow server killed"),
        ("frozen", "the MLflow server frozen (SIGSTOP)"),
        ("blinked", "the MLflow server frozen for a second"),
    ],
)
def test_training_does_not_notice(
    name: str,
    what: str,
    server: MlflowServer,
    data_dir: Path,
    tmp_path: Path,
    uninterrupted: list[dict[str, Any]],
    figures: Figures,
) -> None:
    break_it: dict[str, Callable[[], None]] = {
        "answers": nothing,
        "killed": server.kill,
        "frozen": server.freeze,
        "blinked": lambda: blink(server),
    }
    mend_it: dict[str, Callable[[], None]] = {"answers": nothing, "killed": server.start, "frozen": server.thaw, "blinked": nothing}
    tracking = {"mlflow": True, "mlflow_uri": server.uri, "log_every_steps": 5}
    with FaultyRun(tmp_path, recipe_of(tmp_path, data_dir, tracking=tracking, run={"name": tmp_path.name})) as run:
        run.start(num_ranks=1)
        run.wait_for_step(3)
        break_it[name]()
        run.wait_for_step(STEPS)
        start = time.monotonic()
        assert run.wait(60) == 0, run.output[-3000:]
        exit_s = time.monotonic() - start
        assert exit_s <= EXIT_S
        assert not run.orphans()
        assert_same_records(run.records(), uninterrupted)
        mend_it[name]()
        command = [sys.executable, "-m", "megavlm.cli", "track", "replay", str(run.dir)]
        path = os.pathsep.join(p for p in sys.path if p)
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr
        assert points(server, run) == list(range(1, STEPS + 1))
    figures[f"MLflow {name}"] = {
        "what": f"{what}; the process ended {exit_s:.1f} s after its last step",
        "code": 0,
        "lost": 0,
        "loss": "1e-5",
    }
