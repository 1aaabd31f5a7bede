"""The part of MLflow tracking that talks to a store or server. It may block: only the delivering process calls it.

Measured with mlflow 3.17 (docs/tracking.md): importing it takes 2 s, a fresh sqlite store 2-7 s (schema migrations),
log_metric 64 a second, log_batch of 1,000 metrics 9,700 a second; a dead server blocks the default client for 246 s.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from megavlm.tracking.metrics import flatten
from megavlm.tracking.run_start import Start, save_run_id, saved_run_id
from megavlm.tracking.spool import Item
from megavlm.tracking.spool_folders import only_one

MAX_METRICS_PER_BATCH = 1000
MAX_PARAMS_PER_BATCH = 100
MAX_TAGS_PER_BATCH = 100
MAX_KEY_CHARS = 250
MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000

STATUSES = ("RUNNING", "SCHEDULED", "FINISHED", "FAILED", "KILLED")

# A request to a server that does not answer ends after this; repeating is this package's business, not urllib3's.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
UPLOAD_TIMEOUT_S = 600
"""So long an upload may stand still, or its store think about it: a model has gigabytes. Nobody waits for it but other files."""
_NOT_NOW = (401, 403, 408, 429)
"""Answers to an upload that may be others another time: no permission yet, a quota, too many requests."""
_LOCK_FILE = "mlflow_run_id.lock"
_TABLES_TAG = "mlflow.loggedArtifacts"
_MODEL_FOLDER = "model"
_DIGEST_TAG = "megavlm.digest"
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


class TrackingError(ValueError):
    """A tracking setting that cannot work."""


class Rejected(Exception):
    """The store understood these records and will never take them; sending them again is useless."""


def tracking_uri(configured: str | None, run_dir: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Where to log: `configured`, else MLFLOW_TRACKING_URI, else sqlite:///<run_dir's parent>/mlflow.db.

    Raises TrackingError for a folder store, which mlflow >= 3 refuses.
    """
    uri = configured or environment.get("MLFLOW_TRACKING_URI") or f"sqlite:///{run_dir.resolve().parent / 'mlflow.db'}"
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        raise TrackingError(
            f"tracking.mlflow_uri={without_password(uri)!r} is a folder store, which mlflow no longer takes: "
            "use sqlite:////absolute/path/mlflow.db or http(s)://server:port (or set tracking.mlflow=false)"
        )
    return uri


def without_password(text: str) -> str:
    """`text` with the user and password of any URI in it replaced, fit for a log or a message."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


def one_line(error: Exception) -> str:
    """What went wrong: without passwords, cut to what fits in a log."""
    return (without_password(f"{type(error).__name__}: {error}").splitlines() or [""])[0][:300]


def how_to_open(uri: str, experiment_id: str | None, run_id: str | None) -> str:
    """The command that shows the run: `mlflow ui ...` for a database, the page's address for a server."""
    scheme = urlsplit(uri).scheme
    if scheme in ("http", "https"):
        parts = urlsplit(uri)
        host = parts.netloc.rsplit("@", 1)[-1]
        page = f"/experiments/{experiment_id}/runs/{run_id}" if experiment_id and run_id else "/"
        return urlunsplit((parts.scheme, host, parts.path.rstrip("/") + "/", "", page))
    return f"mlflow ui --backend-store-uri {shlex.quote(without_password(uri))}"


def param_values(recipe: Mapping[str, Any]) -> dict[str, str]:
    """A dumped recipe as MLflow params: nested keys joined by ".", stages by their name, lists as JSON; no URI's password."""
    tree = dict(recipe)
    if isinstance(stages := tree.get("stages"), list):
        tree["stages"] = {stage["name"]: {k: v for k, v in stage.items() if k != "name"} for stage in stages}
        tree["stage_order"] = [stage["name"] for stage in stages]
    flat = flatten(tree, ".")
    texts = {k: without_password(v if isinstance(v, str) else json.dumps(v)) for k, v in flat.items()}
    return {store_key(k): _shorten(v, MAX_PARAM_CHARS) for k, v in texts.items()}


def store_key(name: str) -> str:
    """`name` with the characters that MLflow keys may hold; a changed or shortened one gets a digest, so none collide."""
    key = re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
    # MLflow treats keys as paths: "a//b" and "../a" are refused.
    key = re.sub(r"/+", "/", key).strip("/")
    key = "/".join("_" if part in (".", "..") else part for part in key.split("/"))
    if key == name and len(key) <= MAX_KEY_CHARS:
        return key
    import hashlib

    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{key[: MAX_KEY_CHARS - 9]}-{digest}"


def prepare_client_environment() -> None:
    """Short timeouts without retries, no usage reports to the outside, no prints into our output. What the user has set stays."""
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)


class MlflowStore:
    """One run in one store. Every method blocks and may raise whatever the client raises. `send` and `send_file` may be called from two
    threads at once.

    Args:
        uri: tracking URI.
        experiment: experiment name, created when missing.
        run_name: name of a new run.
        run_dir: where a new run's id is saved.
        run_id: run to continue; a new one is made when the store does not have it.
        params: for a new run. A continued run keeps its own: a changed value becomes the tag recipe.<key>.
        warn: takes a text for the user.
        reopen: a run to continue is RUNNING again; False leaves its status, since nothing trains.
        start: of training; a later one may have begun while this process is at its last words. None: nothing trains, or not here.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        run_name: str,
        run_dir: Path,
        run_id: str | None,
        params: Mapping[str, str],
        warn: Callable[[str], None],
        reopen: bool = True,
        start: Start | None = None,
    ) -> None:
        self._uri, self._experiment, self._run_name, self._run_dir = uri, experiment, run_name, run_dir
        self._params, self._warn, self._reopen, self._start = dict(params), warn, reopen, start
        self.run_id = run_id
        self.experiment_id: str | None = None
        self._client: Any = None

    @property
    def address(self) -> str:
        """The store's URI, fit for a message."""
        return without_password(self._uri)

    @property
    def is_open(self) -> bool:
        return self._client is not None

    def open(self) -> None:
        """Connect, and find or make experiment and run."""
        from mlflow import MlflowClient

        _allow_long_uploads()
        # Their INFO lines about every schema migration would bury the training log.
        for name in ("mlflow.store.db", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        with _one_process_at_a_time(self._uri):
            client = MlflowClient(tracking_uri=self._uri)
            experiment = client.get_experiment_by_name(self._experiment)
            self.experiment_id = experiment.experiment_id if experiment is not None else self._create_experiment(client)
        with only_one(self._run_dir / _LOCK_FILE):
            # A program beside this one may have made the run since this one was started.
            if self.run_id is None and self._has_the_folder():
                self.run_id = saved_run_id(self._run_dir)
            params = self._continue_run(client) if self.run_id else None
            if params is None:
                run = client.create_run(self.experiment_id, run_name=self._run_name)
                self.run_id, params = run.info.run_id, {}
                if self._has_the_folder():
                    save_run_id(self._run_dir, run.info.run_id)
        self._log_params(client, params)
        self._client = client

    def _has_the_folder(self) -> bool:
        return self._start is None or self._start.has_the_folder(self._run_dir)

    def _decides_status(self) -> bool:
        return self._start is None or not self._start.has_successor(self._run_dir)

    def answers(self) -> bool:
        """Whether the store itself is well: it knows the run."""
        try:
            self._client.get_run(self.run_id)
        except Exception:
            return False
        return True

    def _create_experiment(self, client: Any) -> str:
        from mlflow.exceptions import MlflowException

        try:
            return str(client.create_experiment(self._experiment, artifact_location=artifact_location(self._uri, self._run_dir)))
        except MlflowException:
            # Another run may have made it since we looked.
            found = client.get_experiment_by_name(self._experiment)
            if found is None:
                raise
            return str(found.experiment_id)

    def _continue_run(self, client: Any) -> dict[str, str] | None:
        """Params of the run to continue; None when the store does not have it."""
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._warn(f"MLflow has no run {self.run_id} at {without_password(self._uri)}: a new run is made")
            return None
        if run.info.lifecycle_stage != "active":
            self._warn(f"MLflow run {self.run_id} was deleted: a new run is made")
            return None
        self.experiment_id = run.info.experiment_id
        if self._reopen and self._decides_status():
            client.update_run(self.run_id, status="RUNNING")
        return dict(run.data.params)

    def _log_params(self, client: Any, stored: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(k, v) for k, v in self._params.items() if k not in stored]
        changed = {f"recipe.{k}": v for k, v in self._params.items() if k in stored and stored[k] != v}
        for batch in _batches(new, MAX_PARAMS_PER_BATCH):
            client.log_batch(self.run_id, params=batch, synchronous=True)
        if changed:
            # MLflow params are written once; overwriting one raises.
            names = ", ".join(sorted(changed)[:5]) + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")
            self._warn(f"the recipe differs from the one that MLflow run {self.run_id} began with; new values are in its tags {names}")
            self._log_tags(client, changed)

    def _log_tags(self, client: Any, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(store_key(k), _shorten(v, MAX_TAG_CHARS)) for k, v in tags.items()]
        for batch in _batches(entries, MAX_TAGS_PER_BATCH):
            client.log_batch(self.run_id, tags=batch, synchronous=True)

    def send(self, items: Iterable[Item]) -> None:
        """Log metrics, tags and the status in `items`, whatever their number. Raises Rejected for those never to be taken, else what the
        client raises."""
        from mlflow.entities import Metric

        assert self._client is not None, "send() before open()"
        items = list(items)
        metrics = [
            Metric(store_key(name), value, item["time_ms"], item["step"])
            for item in items
            if item["kind"] == "metrics"
            for name, value in item["values"].items()
        ]
        tags: dict[str, str] = {}
        for item in items:
            if item["kind"] == "tags":
                tags.update(item["values"])
        for batch in _batches(metrics, MAX_METRICS_PER_BATCH):
            self._guard(self._client.log_batch, self.run_id, metrics=batch, synchronous=True)
        if tags:
            self._guard(self._log_tags, self._client, tags)
        for item in items:
            if item["kind"] == "status" and self._decides_status():
                self._guard(self._client.set_terminated, self.run_id, status=item["status"], end_time=item["time_ms"])

    def send_file(self, item: Item) -> None:
        """Upload an artifact, a table or a model; may take long. Raises Rejected for one never to be taken, else what the client raises."""
        assert self._client is not None, "send_file() before open()"
        try:
            if item["kind"] == "model":
                self._send_model(item)
            else:
                self._send_artifact(item)
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)  # of requests' errors
            if status is not None and 400 <= status < 500 and status not in _NOT_NOW:
                raise Rejected(str(error)) from error
            raise

    def _send_artifact(self, item: Item) -> None:
        path = Path(item["path"])
        if not path.exists():
            raise Rejected(f"artifact {path} is gone: a file handed to MLflow must stay until the run ends")
        log = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
        self._guard(log, self.run_id, str(path), item["folder"] or None)
        if item["kind"] == "table":
            self._list_table(f"{item['folder']}/{path.name}".lstrip("/"))

    def _list_table(self, path: str) -> None:
        """MLflow's page of evaluation tables shows what this tag of its names."""
        with only_one(self._run_dir / _LOCK_FILE):  # a training and an evaluation beside it both add to the tag
            tables = json.loads(self._client.get_run(self.run_id).data.tags.get(_TABLES_TAG, "[]"))
            entry = {"path": path, "type": "table"}
            if entry not in tables:
                self._guard(self._log_tags, self._client, {_TABLES_TAG: json.dumps([*tables, entry])})

    def _send_model(self, item: Item) -> None:
        """Upload a folder and make it a version of the registered model; once, however often it is sent."""
        path, name = Path(item["path"]), item["name"]
        if not path.is_dir():
            raise Rejected(f"the model's folder {path} is gone: export it again and register it with `megavlm convert export --register`")
        artifacts = f"{_MODEL_FOLDER}/{item['digest']}"
        self._guard(self._make_registered_model, name)
        mine = self._client.search_model_versions(f"run_id='{self.run_id}'")
        if any(v.name == name and v.tags.get(_DIGEST_TAG) == item["digest"] for v in mine):
            return
        self._guard(self._client.log_artifacts, self.run_id, str(path), artifacts)
        source = f"{self._client.get_run(self.run_id).info.artifact_uri}/{artifacts}"
        tags = {_DIGEST_TAG: item["digest"], "format": "huggingface"}
        self._guard(self._client.create_model_version, name, source, self.run_id, tags=tags)

    def _make_registered_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _guard(self, call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Tell "never" from "not now": only an answer that the request itself is wrong is final."""
        from mlflow.exceptions import MlflowException

        try:
            call(*arguments, **options)
        except MlflowException as error:
            if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise Rejected(str(error)) from error
            raise


def artifact_location(uri: str, run_dir: Path) -> str | None:
    """Where a new experiment keeps files: None lets a server decide; a bare database would use the current folder."""
    scheme, rest = urlsplit(uri).scheme.split("+")[0], uri.split(":///", 1)[-1]
    if scheme not in _DATABASES:
        return None
    folder = Path(rest).resolve().parent if scheme == "sqlite" and rest else run_dir.resolve().parent
    return (folder / "mlartifacts").as_uri()


def _allow_long_uploads() -> None:
    """MLflow's client has one limit for all requests, which is short here (_CLIENT_SETTINGS): uploads to its server get their own."""
    from functools import partial

    from mlflow.store.artifact import http_artifact_repo as uploads
    from mlflow.utils.rest_utils import http_request

    limit = max(UPLOAD_TIMEOUT_S, int(os.environ.get("MLFLOW_HTTP_REQUEST_TIMEOUT", "0")))
    uploads.http_request = partial(http_request, timeout=limit)  # type: ignore[attr-defined]


def _one_process_at_a_time(uri: str) -> Any:
    """Lock beside a sqlite file: two processes that create its tables at once break each other's migration."""
    from contextlib import nullcontext

    if urlsplit(uri).scheme.split("+")[0] != "sqlite":
        return nullcontext()
    from filelock import FileLock

    path = Path(uri.split(":///", 1)[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock", timeout=60)


def _batches(entries: list[Any], size: int) -> Iterable[list[Any]]:
    return (entries[i : i + size] for i in range(0, len(entries), size))


def _shorten(text: str, limit: int) -> str:
    """MLflow would cut long values itself, without a word."""
    if len(text) <= limit:
        return text
    note = f"... [{len(text)} characters; all of them in recipe.yaml]"
    return text[: limit - len(note)] + note
