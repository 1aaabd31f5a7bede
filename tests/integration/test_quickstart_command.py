"""`megavlm quickstart` from end to end with a tiny model: data, two ranks, measuring, export, Hugging Face, MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow

from megavlm.config.load import dump_recipe
from megavlm.testing.recipes import tiny_recipe, tiny_stage

ROOT = Path(__file__).parents[2]


def test_quickstart_leaves_what_it_promises(tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path / "run",
        tmp_path / "data",
        [tiny_stage("first", steps=2), tiny_stage("second", steps=2)],
        run={"num_ranks": 2},
        evaluation={"sources": ["held_out"], "every_steps": 2},
        tracking={"mlflow": True, "num_sample_pictures": 2},
    )
    dump_recipe(recipe, tmp_path / "recipe.yaml")
    paths = os.pathsep.join(str(p) for p in (ROOT, ROOT / "kernels", ROOT / "launchers"))
    command = [
        *(sys.executable, "-m", "megavlm.cli", "quickstart", "--recipe", str(tmp_path / "recipe.yaml")),
        *("--samples", "3", "--pages", "300"),
    ]
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "Hugging Face agrees on" in done.stdout
    assert "mlflow ui --backend-store-uri" in done.stdout.splitlines()[-1]
    tasks = json.loads((tmp_path / "run" / "evaluation" / "evaluation.json").read_text())["tasks"]
    assert {t["task"] for t in tasks} == {"reading", "counting", "caption", "grounding"}
    for name in ("hf/model.safetensors", "hf/processor_config.json", "evaluation/pictures.png", "curves.png", "recipe.yaml"):
        assert (tmp_path / "run" / name).exists(), name
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    run_id = (tmp_path / "run" / "mlflow_run_id").read_text().strip().strip('"')
    metrics = client.get_run(run_id).data.metrics
    assert {"loss", "grad_norm", "stage_loss/first", "stage_loss/second", "held_out/reading/right_picture"} <= set(metrics)
