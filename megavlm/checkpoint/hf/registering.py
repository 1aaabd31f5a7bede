"""The exported Hugging Face folder of a run as a version of a registered model in MLflow."""

from __future__ import annotations

import json
from pathlib import Path

from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.hf.export import export_hf
from megavlm.checkpoint.hf.sources import find_checkpoint
from megavlm.config.schema import Recipe
from megavlm.tracking.console import get_logger
from megavlm.tracking.mlflow_sink import sink_for
from megavlm.tracking.mlflow_store import TrackingError

EXPORT_FOLDER = "hf"
_NOTE = "registered.json"
_log = get_logger(__name__)


def register_folder(recipe: Recipe, folder: str | Path, name: str) -> int:
    """Upload a folder into the MLflow run of the recipe's run.dir and make it the next version of the model `name`.

    Returns the number of records that MLflow has not taken: they wait in the run's spool. Raises TrackingError with tracking.mlflow=false,
    and for a name that MLflow refuses.
    """
    if not name.strip() or "/" in name or ":" in name:
        raise TrackingError(f"{name!r} cannot be a registered model's name: give one without / and :")
    sink = sink_for(recipe)
    if sink is None:
        raise TrackingError(f"tracking.mlflow=false: the run in {recipe.run.dir} is not in MLflow, so no model can be registered with it")
    sink.model(folder, name)
    return sink.finish(None, recipe.tracking.register_timeout_s)


def register_newest(recipe: Recipe) -> None:
    """Export the run's newest checkpoint to <run.dir>/hf and register it as recipe.tracking.register_model; once for each checkpoint.

    A checkpoint that cannot be exported is a warning: its training is done all the same.
    """
    run_dir, name = Path(recipe.run.dir), recipe.tracking.register_model
    assert name is not None
    again = f"`megavlm convert export {run_dir} FOLDER --register {name}` does it later"
    try:
        what = {"checkpoint": find_checkpoint(run_dir).name, "model": name}
        note = run_dir / _NOTE
        if note.exists() and json.loads(note.read_text(encoding="utf-8")) == what:
            return
        exported = export_hf(run_dir, run_dir / EXPORT_FOLDER, overwrite=True)
        _log.info("exported to %s; MLflow gets it as a version of %s", exported.folder, name)
        left = register_folder(recipe, exported.folder, name)
        note.write_text(json.dumps(what) + "\n", encoding="utf-8")
    except (ValueError, OSError, CheckpointError) as error:
        _log.warning("the model could not be registered as %s (%s): %s", name, error, again)
        return
    if not left:
        _log.info("%s is registered in MLflow as a version of %s", what["checkpoint"], name)
