"""Programs that tell MLflow of one run at a time: a training, an evaluation of its checkpoint, a replay; and a server that goes away."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.config.load import dump_recipe
from megavlm.testing.mlflow_server import MlflowServer
from megavlm.testing.recipes import tiny_recipe, tiny_stage
from megavlm.tracking.metrics import read_metrics
from megavlm.tracking.spool_folders import waiting_of
from tests.integration.test_mlflow_stores import client_of, history

pytest.importorskip("mlflow")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def megavlm(*arguments: object, codes: tuple[int, ...] = (0,)) -> str:
    command = [sys.executable, "-m", "megavlm.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode in codes, done.stdout + done.stderr
    return done.stdout + done.stderr


def wait_until(condition, what: str, timeout_s: float = 90.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


def last_step(run_dir: Path) -> int:
    return max((r["step"] for r in read_metrics(run_dir)), default=0) if (run_dir / "metrics.jsonl").exists() else 0


def test_an_evaluation_and_a_replay_beside_a_training_lose_nothing_and_double_nothing(tmp_path, data_dir):
    run_dir, file = tmp_path / "run", tmp_path / "recipe.yaml"
    with MlflowServer(tmp_path) as server, contextlib.ExitStack() as stack:
        tracking = {"mlflow": True, "mlflow_uri": server.uri, "experiment": "tests", "system_metrics_every_s": None, "log_every_steps": 50}
        stages = [tiny_stage(steps=100_000)]
        dump_recipe(tiny_recipe(run_dir, data_dir, stages, tracking=tracking, checkpoint={"every_steps": 20}), file)
        with open(tmp_path / "log", "wb") as log:
            training = subprocess.Popen([sys.executable, "-m", "megavlm.cli", "train", str(file)], stdout=log, stderr=log)
        stack.callback(training.wait)
        stack.callback(training.kill)
        wait_until(lambda: (run_dir / "checkpoints" / "latest").exists() and (run_dir / "mlflow_run_id").exists(), "a checkpoint")
        run_id = (run_dir / "mlflow_run_id").read_text().strip()
        evaluate = ("evaluate", run_dir, "--samples", 2, "--source", "pages", "--device", "cpu")
        assert "also in the run's MLflow" in megavlm(*evaluate, "--out", tmp_path / "first")
        server.kill()
        evaluated = last_step(run_dir)
        assert "did not take it" in megavlm(*evaluate, "--out", tmp_path / "second")
        assert training.poll() is None and waiting_of(run_dir).left and waiting_of(run_dir).held
        server.start()
        replayed = megavlm("track", "replay", run_dir, codes=(0, 1))  # 1: the training has some of its own just now
        assert "records sent" in replayed and training.poll() is None
        assert not waiting_of(run_dir).left, "the evaluation's are sent; the training's are its own"
        os.kill(training.pid, signal.SIGTERM)
        assert training.wait(60) == 128 + signal.SIGTERM, (tmp_path / "log").read_text()[-3000:]
        if waiting_of(run_dir).left:  # a server that was away is asked again after a while, and the exit waits for 3 s
            megavlm("track", "replay", run_dir)
        assert not (run_dir / "mlflow-spool").exists() and not (run_dir / "mlflow-rejected.jsonl").exists()
        client, records = client_of(server.uri), read_metrics(run_dir)
        assert history(client, run_id, "loss") == [(r["step"], r["loss"]) for r in records] and len(records) > evaluated
        run = client.get_run(run_id)
        assert run.info.status == "KILLED"
        shares = [name for name in run.data.metrics if name.startswith("evaluation/heldout/")]
        steps = {name: [step for step, _ in history(client, run_id, name)] for name in shares}
        assert shares and all(len(found) == len(set(found)) == 2 for found in steps.values()), steps
        tables = {step for name in shares for step in steps[name]}
        for step in tables:
            folder = f"evaluation/step-{step:08d}-heldout"
            assert {"mlflow-samples.json", "predictions.jsonl"} <= {Path(f.path).name for f in client.list_artifacts(run_id, folder)}
            assert f"{folder}/mlflow-samples.json" in run.data.tags["mlflow.loggedArtifacts"]
