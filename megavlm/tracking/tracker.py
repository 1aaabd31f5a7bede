"""What training tells the world: one object that writes metrics.jsonl, the console and MLflow.

Only rank 0 writes. On every other rank the same calls do nothing, so training never asks who it is.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from megavlm.config.schema import Recipe
from megavlm.tracking.console import TrainingDisplay, get_logger, setup_logging
from megavlm.tracking.curves import plot_curves
from megavlm.tracking.environment import environment_report
from megavlm.tracking.goodput import GoodputMeter
from megavlm.tracking.metrics import EVALUATION_FILE, METRICS_FILE, MetricsWriter, flatten, read_cut, set_cut_aside, to_plain
from megavlm.tracking.mlflow_sink import MlflowSink, node_of, sink_for
from megavlm.tracking.mlflow_store import TrackingError, without_password
from megavlm.tracking.ranks import RankReport, write_ranks
from megavlm.tracking.spool_folders import SPOOL_FOLDER

MLFLOW_EVERY_STEP = ("loss", "grad_norm")
"""What MLflow gets of every step; the whole record goes there every tracking.log_every_steps. One number costs the store
0.12 ms of CPU (sqlite, mlflow 3.17): forty of each step would take 5 ms from a training thread that shares its interpreter."""

MLFLOW_WHEN_THERE = ("memory/", "all_ranks_time_s/", "straggler/")
"""What is in few records, and goes to MLflow from each of them."""

_TAG_CHARACTERS = 500
_log = get_logger(__name__)


class Tracker:
    """Records of one run.

    with Tracker(recipe, rank, world_size) as tracker:
        tracker.start(resume_step)
        tracker.stage_begins("align", total_steps=200, first_step=0)
        tracker.step({"step": 1, "stage": "align", "stage_step": 1, "loss": 2.3, "lr": {"projector": 1e-3}, ...})

    Leaving the block ends the run as FINISHED, as KILLED after Ctrl-C, as FAILED after any other exception.

    Args:
        recipe: names the run's folder, the MLflow store and the line interval.
        rank: this process; 0 writes.
        world_size: processes of the run.
        interactive: draw a progress bar; None: when stdout is a terminal.
        shows_mfu: False where the peak was measured on a CPU: the console writes "mfu -", metrics.jsonl keeps the number.
    """

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1, interactive: bool | None = None, shows_mfu: bool = True) -> None:
        self._recipe = recipe
        self.run_dir = Path(recipe.run.dir)
        self.writes = rank == 0
        self._world_size = world_size
        console = setup_logging(rank, world_size, stream=sys.stdout)
        self._display = TrainingDisplay(recipe.tracking.log_every_steps, console, interactive, shows_mfu) if self.writes else None
        self._metrics: MetricsWriter | None = None
        self._evaluations: MetricsWriter | None = None
        self._mlflow: MlflowSink | None = None
        self._logged_files: set[str] = set()
        self._incidents: dict[str, int] = {}
        self._goodput: GoodputMeter | None = None
        self._node = node_of(rank, world_size, os.environ)
        self._earlier: dict[int, list[dict[str, Any]]] = {}
        self._earlier_evaluations: dict[int, list[dict[str, Any]]] = {}
        self._finished = False

    def start(self, resume_step: int = 0) -> None:
        """Open everything. `resume_step`: optimizer steps that the loaded checkpoint has done; later records are cut.

        Writes environment.json. A resumed run keeps one report per start: environment.json is the newest, the first
        one is environment-<step>.json, and so on.
        """
        if not self.writes:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._metrics = MetricsWriter(self.run_dir, resume_step)
        self._evaluations = MetricsWriter(self.run_dir, resume_step, EVALUATION_FILE, one_per_step=False)
        if not resume_step:  # in a new MLflow run, which has nothing of what was cut
            set_cut_aside(self._metrics.path)
            set_cut_aside(self._evaluations.path)
        if cut := self._metrics.num_cut_lines:
            _log.info("%s: %d lines after step %d moved to metrics.cut*.jsonl", METRICS_FILE, cut, resume_step)
        self._goodput = GoodputMeter(self.run_dir)
        report = {**environment_report(), "world_size": self._world_size, "resume_step": resume_step}
        _write_json(self.run_dir / "environment.json", report)
        self._find_earlier(resume_step)
        self._mlflow = sink_for(self._recipe, resume_step, self._node)
        if self._mlflow is not None:
            self._mlflow.tags({"run_dir": self.run_dir.resolve(), **_mutable_tags(report)})
            self._mlflow.artifact(self.run_dir / "environment.json")
        self._log_recipe_file()

    def _find_earlier(self, resume_step: int) -> None:
        """What an earlier start of this MLflow run sent, or has in the spool, of steps that are made again."""
        goes_on = (self.run_dir / "mlflow_run_id").exists() or (self.run_dir / SPOOL_FOLDER).exists()
        if resume_step and goes_on and self._metrics is not None and self._evaluations is not None:
            self._earlier = read_cut(self._metrics.path, resume_step)
            self._earlier_evaluations = read_cut(self._evaluations.path, resume_step)

    def go_back(self, step: int) -> None:
        """Training goes on after `step`, which it has passed (a rollback): later records of metrics.jsonl and evaluation.jsonl are cut."""
        if self._metrics is None or self._evaluations is None:
            return
        self._metrics.close()
        self._evaluations.close()
        self._metrics = MetricsWriter(self.run_dir, step)
        self._evaluations = MetricsWriter(self.run_dir, step, EVALUATION_FILE, one_per_step=False)
        if self._goodput is not None:
            self._goodput.recount()

    def stage_begins(self, stage: str, total_steps: int, first_step: int = 0) -> None:
        """`total_steps` of the stage, `first_step` of them done before this start (0 unless resumed inside the stage)."""
        if self._display is None:
            return
        self._display.stage_begins(stage, total_steps, first_step)
        self._log_recipe_file()
        if self._mlflow is not None:
            self._mlflow.tags({"stage": stage})

    def step(self, record: Mapping[str, Any]) -> None:
        """One optimizer step. Needs "step" (steps done, over all stages: 1 after the first); the rest is free.

        Known to the console and the curves: stage, stage_step, loss, grad_norm, lr {group: rate}, tokens_per_s, mfu,
        step_time_s, data_wait_s, task_loss {task: loss}. metrics.jsonl keeps nesting; in MLflow lr/vision, task_loss/caption.
        MLflow gets MLFLOW_EVERY_STEP of each step, and the whole record every tracking.log_every_steps.

        Raises MetricsError for a value that is no number or text, and for a step that does not follow the last.
        """
        if self._metrics is None or self._display is None:
            self._follow()
            return
        record = to_plain(record)
        if self._goodput is not None:
            self._goodput.add(record)
            if self._is_whole(record):
                record = {**record, "goodput": self._goodput.now().values}
        self._metrics.check(record)
        # MLflow's copy first: a step whose line is in metrics.jsonl is known to be there, should this process be killed between the two.
        if self._mlflow is not None and not _is_same_step(record, self._earlier.pop(record["step"], ())):
            self._mlflow.metrics(record["step"], self._mlflow_values(record))
        self._metrics.write(record)
        self._display.step(record)

    def _follow(self) -> None:
        """A node's first rank sends what the node's processors, memory and GPUs do. Only from the first step on: the first node has made
        the MLflow run by then, since every rank takes part in a step."""
        wanted = self._recipe.tracking.system_metrics_every_s is not None
        if self._node is not None and self._node.index and wanted and self._mlflow is None and not self._finished:
            try:
                self._mlflow = sink_for(self._recipe, 1, self._node)
            except (OSError, TrackingError) as error:  # a full disk, no more processes
                _log.warning("MLflow gets no system metrics of node %d: %s", self._node.index, error)
                self._node = None  # so that it is not tried again

    def _is_whole(self, record: Mapping[str, Any]) -> bool:
        """Does MLflow get the whole record?"""
        return bool((record["step"] - 1) % self._recipe.tracking.log_every_steps == 0)

    def _mlflow_values(self, record: Mapping[str, Any]) -> dict[str, float]:
        whole = self._is_whole(record)
        values = _numbers(record)
        if not whole:
            values = {k: v for k, v in values.items() if k in MLFLOW_EVERY_STEP or k.startswith(MLFLOW_WHEN_THERE)}
        if "loss" in values and record.get("stage"):
            values[f"stage_loss/{record['stage']}"] = values["loss"]
        return values

    def evaluation(self, record: Mapping[str, Any]) -> None:
        """A measurement on held-out data at "step"; nested as the caller likes. Goes to evaluation.jsonl, MLflow, console."""
        if self._evaluations is None or self._display is None:
            return
        record = to_plain(record)
        values = {k: v for k, v in _numbers(record).items() if k not in ("step", "stage_step")}
        shown = "  ".join(f"{k} {v:.4g}" for k, v in values.items())
        self._display.message(f"evaluation at step {record['step']}  {shown}")
        if self._mlflow is not None and record not in self._earlier_evaluations.get(record["step"], ()):
            self._mlflow.metrics(record["step"], {f"evaluation/{k}": v for k, v in values.items()})
        self._evaluations.write(record)

    def ranks(self, stage: str, reports: Sequence[RankReport]) -> None:
        """What each rank needed in the stage, for ranks.json and MLflow's artifacts."""
        if self.writes and reports:
            self.artifact(write_ranks(self.run_dir, stage, reports))

    def earlier_incidents(self, numbers: Mapping[str, int]) -> None:
        """How many of each kind the run's earlier starts had: counts go on from there."""
        for kind, number in numbers.items():
            self._incidents[kind] = self._incidents.get(kind, 0) + number

    def incident(self, kind: str, step: int, text: str) -> None:
        """Something went wrong at `step` and the run goes on: a warning, and in MLflow a count of that kind and the text as a tag."""
        if self._display is None:
            return
        _log.warning("%s", text)
        self._incidents[kind] = self._incidents.get(kind, 0) + 1
        if self._mlflow is not None:
            self._mlflow.metrics(step, {f"incidents/{kind}": float(self._incidents[kind])})
            self._mlflow.tags({"last_incident": text[:_TAG_CHARACTERS]})

    def message(self, text: str) -> None:
        """A line for whoever watches."""
        if self._display is not None:
            self._display.message(text)

    def picture(self, name: str, picture: Any) -> Path | None:
        """Keep a picture as <run_dir>/pictures/<name>.png (a path: with its own ending) and log it.

        Args:
            name: may hold folders: "align/sample-00".
            picture: path of a file, a matplotlib figure, or a PIL image.

        Returns the kept file; None on ranks that do not write, and where the disk does not take it: a picture must not end a run.
        """
        if not self.writes:
            return None
        folder = self.run_dir / "pictures"
        ending = Path(picture).suffix if isinstance(picture, (str, Path)) else ".png"
        target = folder / (name if ending and name.endswith(ending) else name + ending)
        if not Path(name).name or not target.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"a picture's name is a path inside {folder}, and {name!r} is not")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            if not isinstance(picture, (str, Path)):
                save = getattr(picture, "savefig", None) or picture.save
                save(target)
            elif Path(picture).resolve() != target.resolve():
                shutil.copyfile(picture, target)
        except OSError as error:
            _log.warning("%s could not be written (%s)", target, error)
            return None
        self.artifact(target, target.parent.relative_to(self.run_dir).as_posix())
        return target

    def artifact(self, path: str | Path, folder: str = "") -> None:
        """Log a file or folder to MLflow under `folder`. It is read later and must stay until the run ends."""
        if self._mlflow is not None and self.writes:
            self._mlflow.artifact(path, folder)

    def table(self, path: str | Path, folder: str = "") -> None:
        """Log a JSON file {"columns": [...], "data": [[...]]} as one of MLflow's evaluation tables."""
        if self._mlflow is not None and self.writes:
            self._mlflow.table(path, folder)

    def how_to_open(self) -> str | None:
        """The command that shows the run in MLflow; None without MLflow, and on ranks that do not write."""
        return self._mlflow.how_to_open() if self._mlflow is not None and self.writes else None

    def finish(self, status: str = "FINISHED") -> None:
        """Draw the curves, close everything; a silent MLflow server holds this up for 3 s at most. A second call does nothing.

        Args:
            status: FINISHED, FAILED or KILLED.
        """
        if self._finished:
            return
        self._finished = True
        if not self.writes:
            if self._mlflow is not None:
                self._mlflow.finish(None)
            return
        if self._display is not None:
            self._display.close()
        if self._goodput is not None and (now := self._goodput.now()).kept_s:
            self.message(f"effective training time {now}")
            if self._mlflow is not None:
                self._mlflow.metrics(now.last_step, {f"goodput/{name}": value for name, value in now.values.items()})
        for writer in (self._metrics, self._evaluations):
            if writer is not None:
                writer.close()
        if self._metrics is not None and self._metrics.path.stat().st_size:
            self._draw_curves()
        if self._mlflow is not None:
            self._log_recipe_file()
            self._mlflow.finish(status)
            self.message(f"metrics and pictures of this run: {self.how_to_open()}")

    def _draw_curves(self) -> None:
        try:
            self.artifact(plot_curves(self.run_dir))
        except Exception as error:  # a picture must not turn a trained model into a failed run
            _log.warning("curves.png could not be drawn (%s: %s)", type(error).__name__, error)

    def _log_recipe_file(self) -> None:
        """Log the resolved recipe once it is there: whoever starts the run writes it."""
        path = self.run_dir / "recipe.yaml"
        if self._mlflow is not None and "recipe.yaml" not in self._logged_files and path.exists():
            self._logged_files.add("recipe.yaml")
            text = path.read_text(encoding="utf-8")
            if (public := without_password(text)) != text:
                path = path.with_name("recipe.without-password.yaml")
                path.write_text(public, encoding="utf-8")
            self._mlflow.artifact(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, SystemExit):
            self.finish("FINISHED" if not error.code else "FAILED")
        else:
            self.finish("FINISHED" if kind is None else "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")


def _is_same_step(record: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> bool:
    """Whether an earlier start made this very step: it is in MLflow already, which keeps every point that it is given."""
    return any(old.get("loss") == record.get("loss") and old.get("grad_norm") == record.get("grad_norm") for old in earlier)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record under flat names; texts and nulls are for metrics.jsonl only."""
    return {k: float(v) for k, v in flatten(record).items() if isinstance(v, (int, float)) and k != "step"}


def _mutable_tags(report: Mapping[str, Any]) -> dict[str, object]:
    """What may differ from one start of a run to the next: tags, since MLflow params are written once."""
    gpus = report["gpus"]
    return {
        "world_size": report["world_size"],
        "resume_step": report["resume_step"],
        "git_commit": report["code"]["git_commit"],
        "device": gpus[0]["name"] if gpus else report["cpu"]["model"],
        "torch": report["packages"]["torch"],
        "megatron-core": report["packages"]["megatron-core"],
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace `path` in one go. An earlier report of the same run moves aside under the step it began at."""
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8")).get("resume_step", 0)
        except ValueError:  # edited by hand
            earlier = "unknown"
        os.replace(path, path.with_name(f"environment-{earlier}.json"))
    replacement = path.with_suffix(".new")
    replacement.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(replacement, path)
