"""An evaluation in MLflow, read back with MLflow's own client."""

import io
import json
from types import SimpleNamespace

import pytest
from PIL import Image

from megavlm.config.schema import Recipe
from megavlm.evaluation.pictures import write_samples
from megavlm.evaluation.results import NONE, RIGHT, Answer, EvaluationResult, Share, TaskResult
from megavlm.evaluation.tracking import log_evaluation


def question(colour):
    file = io.BytesIO()
    Image.new("RGB", (600, 300), colour).save(file, "PNG")
    return SimpleNamespace(pictures=lambda: [file.getvalue()], num_pictures=1, box=None)


def answer(number, right, condition=RIGHT):
    text = f"answer {number}"
    return Answer(number, "s", str(number), "colour", condition, "which?", "red", text, right, True)


@pytest.fixture
def result():
    row = TaskResult("colour", "same text", 2, Share(1, 2), Share(0, 2), 0.25, Share(0, 0), Share(1, 2))
    return EvaluationResult("heldout", (row,), (answer(0, True), answer(0, False, NONE), answer(1, False)))


def recipe_for(run_dir, **tracking):
    blocks = {"run": {"dir": str(run_dir), "name": "n"}, "data": {"sources": {"a": {"path": "x"}}}}
    return Recipe.model_validate({**blocks, "stages": [{"name": "s", "steps": 1, "mixture": {"a": 1}}], "tracking": tracking})


def test_samples_are_pictures_with_their_texts(tmp_path, result):
    questions = [question("red"), question("blue")]
    write_samples(questions, result.answers, tmp_path, per_task=6)
    rows = json.loads((tmp_path / "samples.json").read_text())
    assert [(r["picture"], r["prediction"], r["right"]) for r in rows] == [("000.png", "answer 1", False), ("001.png", "answer 0", True)]
    picture = Image.open(tmp_path / "samples" / "000.png")
    assert picture.size == (512, 256) and picture.getpixel((5, 5)) == (0, 0, 255)
    write_samples(questions, result.answers[:1], tmp_path)
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["000.png"], "those of the earlier evaluation are gone"
    assert write_samples([SimpleNamespace(num_pictures=0)], [answer(0, True)], tmp_path / "none") is None


def test_an_evaluation_is_in_the_runs_mlflow(tmp_path, monkeypatch, result):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder, run_dir = tmp_path / "evaluation", tmp_path / "run"
    result.write(folder)
    write_samples([question("red"), question("blue")], result.answers, folder)
    assert log_evaluation(recipe_for(run_dir, mlflow=False), result, folder, 7) is None
    assert log_evaluation(recipe_for(run_dir), result, folder, 7) == 0
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    run = client.get_run((run_dir / "mlflow_run_id").read_text().strip())
    assert run.data.metrics == {
        "evaluation/heldout/colour/right_picture": 0.5,
        "evaluation/heldout/colour/swapped_picture": 0.0,
        "evaluation/heldout/colour/no_picture": 0.5,
    }
    where = "evaluation/step-00000007-heldout"
    tables = json.loads(run.data.tags["mlflow.loggedArtifacts"])
    assert tables == [{"path": f"{where}/mlflow-{n}.json", "type": "table"} for n in ("table", "samples")]
    experiment = run.info.experiment_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")  # load_table asks it, whatever its client was given
    assert client.load_table(experiment, tables[0]["path"], [run.info.run_id])["right picture"].tolist() == [0.5]
    samples = client.load_table(experiment, tables[1]["path"], [run.info.run_id])
    assert samples["prediction"].tolist() == ["answer 1", "answer 0"]
    stored = {f.path for f in client.list_artifacts(run.info.run_id, f"{where}/samples")}
    assert stored == {f"{where}/samples/000.png", f"{where}/samples/001.png"}
    file = json.loads((folder / "mlflow-samples.json").read_text())
    assert file["data"][0][0] == {
        "type": "image",
        "filepath": f"{where}/samples/000.png",
        "compressed_filepath": f"{where}/samples/000.png",
    }
