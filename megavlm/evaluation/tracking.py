"""An evaluation in its run's MLflow: shares by task, the table, and sample predictions with their pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megavlm.config.schema import Recipe
from megavlm.evaluation.pictures import SAMPLES_FILE, SAMPLES_FOLDER
from megavlm.evaluation.results import EvaluationResult
from megavlm.tracking.mlflow_sink import sink_for

FOLDER = "evaluation"
TIMEOUT_S = 60.0
SAMPLES_TABLE = "mlflow-samples.json"
_SHARES = ("right_picture", "swapped_picture", "follows_swapped", "no_picture")


def log_evaluation(recipe: Recipe, result: EvaluationResult, folder: Path, step: int) -> int | None:
    """Send what `EvaluationResult.write` and `write_samples` left in `folder` to the MLflow run of recipe.run.dir.

    Args:
        step: optimizer steps that the measured checkpoint has done.

    Returns the number of records that wait for MLflow; None with tracking.mlflow=false.
    """
    sink = sink_for(recipe)
    if sink is None:
        return None
    where = f"{FOLDER}/step-{step:08d}-{result.split}"
    sink.metrics(step, dict(_shares(result)))
    for name in ("evaluation.json", "predictions.jsonl", "pictures.png"):
        if (folder / name).exists():
            sink.artifact(folder / name, where)
    sink.table(_write(folder / "mlflow-table.json", _table(result)), where)
    if (folder / SAMPLES_FILE).exists():
        log_samples(sink, folder, where)
    return sink.finish(None, TIMEOUT_S)


class TakesFiles(Protocol):
    """A sink, or training's Tracker."""

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Store a file or folder."""

    def table(self, path: str | Path, folder: str = "") -> None:
        """Store a table."""


def log_samples(tracker: TakesFiles, folder: Path, where: str) -> None:
    """Send what `write_samples` left in `folder`: the pictures, and a table of them with question, reference and answer.

    Args:
        where: folder of the MLflow run's artifacts.
    """
    tracker.artifact(folder / SAMPLES_FOLDER, f"{where}/{SAMPLES_FOLDER}")
    tracker.table(_write(folder / SAMPLES_TABLE, _samples(folder / SAMPLES_FILE, where)), where)


def _shares(result: EvaluationResult) -> Iterator[tuple[str, float]]:
    for row in result.tasks:
        for name in _SHARES:
            value = getattr(row, name).value
            if value is not None:
                yield f"evaluation/{result.split}/{row.task}/{name}", value


def _table(result: EvaluationResult) -> dict[str, Any]:
    columns = ("task", "right means", "samples", *(name.replace("_", " ") for name in _SHARES), "chance")
    data = [[row.task, row.metric, row.samples, *(getattr(row, name).value for name in _SHARES), row.chance] for row in result.tasks]
    return {"columns": list(columns), "data": data}


def _samples(file: Path, where: str) -> dict[str, Any]:
    """The samples with their pictures as MLflow's tables show them: by their place among the run's artifacts."""
    rows = json.loads(file.read_text(encoding="utf-8"))
    texts = ("task", "question", "reference", "prediction", "right")
    data = []
    for row in rows:
        place = f"{where}/{SAMPLES_FOLDER}/{row['picture']}"
        data.append([{"type": "image", "filepath": place, "compressed_filepath": place}, *(row[name] for name in texts)])
    return {"columns": ["picture", *texts], "data": data}


def _write(path: Path, table: dict[str, Any]) -> Path:
    path.write_text(json.dumps(table, ensure_ascii=False), encoding="utf-8")
    return path
