"""Whether MLflow can be logged to, found out in three seconds and without its client (which takes two to import)."""

from __future__ import annotations

import base64
import json
import os
import sqlite3
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from megavlm.cli._doctor.check import Check
from megavlm.config.schema import TrackingConfig
from megavlm.tracking.mlflow_store import TrackingError, tracking_uri, without_password

TIMEOUT_S = 3.0
_LATER = "runs train all the same: their records wait in the run's folder, until the server answers or `megavlm track replay` sends them"


def check_mlflow(tracking: TrackingConfig, run_dir: Path, environ: Mapping[str, str] = os.environ) -> Check:
    """Ask the store that a run in `run_dir` would log to."""
    if not tracking.mlflow:
        return Check("MLflow", "not tried", "tracking.mlflow=false")
    try:
        uri = tracking_uri(tracking.mlflow_uri, run_dir, environ)
    except TrackingError as error:
        return Check("MLflow", "broken", str(error), "the run does not start", needed=True)
    scheme = urlsplit(uri).scheme
    if scheme.split("+")[0] == "sqlite":
        return _sqlite(uri)
    if scheme not in ("http", "https"):
        return Check("MLflow", "not tried", f"{without_password(uri)}: only http, https and sqlite are asked here")
    return _server(uri, environ)


def _sqlite(uri: str) -> Check:
    path = Path(uri.split(":///", 1)[-1])
    folder = next((p for p in path.parents if p.is_dir()), Path("/"))
    if not path.exists():
        if os.access(folder, os.W_OK):
            return Check("MLflow", "ok", f"{path} is made by the first run")
        return Check("MLflow", "broken", f"{folder} cannot be written to, so {path} cannot be made", _LATER)
    try:
        store = sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=TIMEOUT_S)
        try:
            (runs,) = store.execute("select count(*) from runs").fetchone()
        finally:
            store.close()
    except sqlite3.Error as error:
        return Check("MLflow", "broken", f"{path}: {error}", _LATER)
    if not os.access(path, os.W_OK):
        return Check("MLflow", "broken", f"{path} is not allowed to be written to", _LATER)
    return Check("MLflow", "ok", f"{path}, {runs} runs")


def _server(uri: str, environ: Mapping[str, str]) -> Check:
    parts = urlsplit(uri)
    shown = urlunsplit((parts.scheme, parts.netloc.rsplit("@", 1)[-1], parts.path, "", ""))
    request = urllib.request.Request(
        f"{shown.rstrip('/')}/api/2.0/mlflow/experiments/search",
        data=json.dumps({"max_results": 1}).encode(),
        headers={"Content-Type": "application/json", **_credentials(uri, environ)},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
            found = json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return _refused(shown, error.code, "Authorization" in request.headers)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError) or isinstance(error, TimeoutError):
            return Check("MLflow", "broken", f"{shown}: takes connections, and does not answer in {TIMEOUT_S:.0f} s", _LATER)
        return Check("MLflow", "broken", f"{shown}: {reason}", _LATER)
    if not isinstance(found, dict):
        return Check("MLflow", "broken", f"{shown}: answers, but is no MLflow server", _LATER)
    return Check("MLflow", "ok", f"{shown} answers")


def _refused(shown: str, code: int, named: bool) -> Check:
    if code in (401, 403):
        which = "refuses the user and password (or token) that it was given" if named else "asks for a user and password"
        remedy = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; meanwhile "
        return Check("MLflow", "broken", f"{shown}: {which} (HTTP {code})", remedy + _LATER)
    which = "is no MLflow server, or its path is another" if code == 404 else "is there, and in trouble"
    return Check("MLflow", "broken", f"{shown}: {which} (HTTP {code})", _LATER)


def _credentials(uri: str, environ: Mapping[str, str]) -> dict[str, str]:
    """What MLflow's client would send: the environment's user and password, else its token, else what the URI holds."""
    parts = urlsplit(uri)
    user, password = environ.get("MLFLOW_TRACKING_USERNAME"), environ.get("MLFLOW_TRACKING_PASSWORD")
    if not (user and password) and environ.get("MLFLOW_TRACKING_TOKEN"):
        return {"Authorization": f"Bearer {environ['MLFLOW_TRACKING_TOKEN']}"}
    if not (user and password) and parts.username:
        user, password = unquote(parts.username), unquote(parts.password or "")
    if not user:
        return {}
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
