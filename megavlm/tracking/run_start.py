"""What a run's folder says of its MLflow run: its id, and which start of training was the last.

The process that delivers for an ended training may still be at work when the next one starts. It must then neither say which MLflow run the
folder's is, where the next start makes a new one, nor end the run that the next start goes on with.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

_ID_FILE, _START_FILE = "mlflow_run_id", "mlflow_start.json"


@dataclass(frozen=True)
class Start:
    """A start of training."""

    run: str
    """Another one for each that begins anew, in an MLflow run of its own."""
    training: str
    """Another one for each."""

    @classmethod
    def begin(cls, run_dir: Path, anew: bool) -> Start | None:
        """This is the last one from now on. None: the disk does not take it, and no start is told from another."""
        last = _last(run_dir)
        start = cls(uuid.uuid4().hex if anew or last is None else last.run, uuid.uuid4().hex)
        try:
            _replace(run_dir / _START_FILE, json.dumps(asdict(start)))
        except OSError:
            return None
        return start

    def has_the_folder(self, run_dir: Path) -> bool:
        """Whether the MLflow run of this start is that of the folder: none has begun anew since."""
        last = _last(run_dir)
        return last is None or last.run == self.run

    def has_successor(self, run_dir: Path) -> bool:
        """Whether a later start goes on with the MLflow run of this one."""
        last = _last(run_dir)
        return last is not None and last.run == self.run and last.training != self.training


def saved_run_id(run_dir: Path) -> str | None:
    """Id of the MLflow run that belongs to the run in `run_dir`."""
    try:
        return (run_dir / _ID_FILE).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def save_run_id(run_dir: Path, run_id: str) -> None:
    """Raises OSError."""
    _replace(run_dir / _ID_FILE, run_id)


def forget_run_id(run_dir: Path) -> None:
    """Processes that look for it must not find that of an earlier run."""
    (run_dir / _ID_FILE).unlink(missing_ok=True)


def _last(run_dir: Path) -> Start | None:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads((run_dir / _START_FILE).read_text(encoding="utf-8"))
        return Start(str(found["run"]), str(found["training"]))
    return None


def _replace(path: Path, text: str) -> None:
    replacement = path.with_name(f"{path.name}.new")
    replacement.write_text(f"{text}\n", encoding="utf-8")
    os.replace(replacement, path)
