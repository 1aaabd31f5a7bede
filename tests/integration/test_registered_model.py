"""A trained model all the way into MLflow: registered at the end of training and by an export, its evaluation beside it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.config.load import dump_recipe
from megavlm.testing.recipes import tiny_recipe, tiny_stage

mlflow = pytest.importorskip("mlflow")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def megavlm(*arguments: object) -> str:
    command = [sys.executable, "-m", "megavlm.cli", *map(str, arguments)]
    done = subprocess.run(command, env={**os.environ, "COLUMNS": "140"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train_under_warnings(recipe: Path, run_dir: Path) -> None:
    """Told to save and end, as a SLURM job tells it, all the while that it has nothing left but to say so and to upload its model."""
    log = run_dir.with_name("log")
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "megavlm.cli", "train", str(recipe)], stdout=file, stderr=subprocess.STDOUT)
    try:
        warnings, end = 0, time.monotonic() + 600
        while process.poll() is None:
            assert time.monotonic() < end, "no end within 600 s"
            if (run_dir / "checkpoints" / "latest").exists():
                process.send_signal(signal.SIGUSR2)
                warnings += 1
            time.sleep(0.3)
        assert (process.returncode, warnings > 3) == (0, True), log.read_text()
    finally:
        process.kill()
        process.wait()


def test_training_export_and_evaluation_are_in_one_mlflow_run(tmp_path, data_dir, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run_dir, file = tmp_path / "run", tmp_path / "recipe.yaml"
    tracking = {"mlflow": True, "register_model": "tiny", "system_metrics_every_s": None, "peak_tflops_per_rank": 1.0}
    dump_recipe(tiny_recipe(run_dir, data_dir, [tiny_stage(steps=2)], tracking=tracking), file)
    train_under_warnings(file, run_dir)
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    run_id = (run_dir / "mlflow_run_id").read_text().strip()
    (version,) = client.search_model_versions("name='tiny'")
    assert version.run_id == run_id and client.get_run(run_id).info.status == "FINISHED"
    loaded = mlflow.artifacts.download_artifacts(client.get_model_version_download_uri("tiny", "1"), dst_path=str(tmp_path / "loaded"))
    assert {p.name for p in (run_dir / "hf").iterdir()} == {p.name for p in Path(loaded).iterdir()}
    megavlm("train", file)
    assert len(client.search_model_versions("name='tiny'")) == 1, "the same checkpoint is registered once"

    assert "version of other" in megavlm("convert", "export", run_dir, tmp_path / "hf", "--register", "other")
    assert [v.run_id for v in client.search_model_versions("name='other'")] == [run_id]

    assert "also in the run's MLflow" in megavlm("evaluate", run_dir, "--samples", 2, "--source", "pages", "--device", "cpu")
    run = client.get_run(run_id)
    assert any(name.startswith("evaluation/heldout/") for name in run.data.metrics) and run.info.status == "FINISHED"
    assert "step-00000002-heldout/mlflow-samples.json" in run.data.tags["mlflow.loggedArtifacts"]
    assert not (run_dir / "mlflow-spool").exists()
