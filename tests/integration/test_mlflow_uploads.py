"""Uploads that are refused, slow or impossible, with MLflow's own client against a server that answers as it is told, and a real store."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
import requests

from megavlm.config.schema import TrackingConfig
from megavlm.tracking.mlflow_sink import MlflowSink
from megavlm.tracking.mlflow_store import MlflowStore, Rejected
from megavlm.tracking.spool_folders import num_waiting, spools_of, waiting_of
from tests.integration.test_mlflow_stores import client_of, history

mlflow = pytest.importorskip("mlflow")
RUN = {"info": {"run_id": "r", "run_uuid": "r", "experiment_id": "1", "artifact_uri": "mlflow-artifacts:/1/r/artifacts"}, "data": {}}


class Server(ThreadingHTTPServer):
    """What MLflow's REST interface says of one run; uploads are answered with `status`, after `pause_s`."""

    status, pause_s = 200, 0.0
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        path = urlsplit(self.path).path
        known = {"experiments/get-by-name": {"experiment": {"experiment_id": "1", "name": "n"}}, "runs/get": {"run": RUN}}
        self._answer(200, next((body for end, body in known.items() if path.endswith(end)), {}))

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(200, {"run": RUN})

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        time.sleep(self.server.pause_s)
        self._answer(self.server.status, {})

    def _answer(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    found = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, daemon=True)
    thread.start()
    yield found
    found.shutdown()
    found.server_close()
    thread.join()


def test_what_answers_to_an_upload_mean_and_how_long_it_may_take(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr("mlflow.store.artifact.http_artifact_repo.http_request", mlflow.utils.rest_utils.http_request)
    (tmp_path / "a.txt").write_text("a")
    store = MlflowStore(f"http://127.0.0.1:{server.server_port}", "n", "n", tmp_path, None, {}, print)
    store.open()
    item = {"kind": "artifact", "path": str(tmp_path / "a.txt"), "folder": ""}
    for status in (400, 404, 405, 413, 422):
        server.status = status
        with pytest.raises(Rejected, match=str(status)):
            store.send_file(item)
    for status in (401, 403, 408, 429, 500, 503):
        server.status = status
        with pytest.raises((requests.HTTPError, mlflow.MlflowException), match=str(status)):
            store.send_file(item)
    with pytest.raises(Rejected, match="gone"):
        store.send_file({**item, "path": str(tmp_path / "b.txt")})
    server.status, server.pause_s = 200, 1.5  # longer than any other request may take
    store.send_file(item)
    assert store.answers()


@pytest.mark.slow
def test_metrics_go_on_where_files_cannot_be_stored_and_those_arrive_when_they_can(tmp_path):
    """Where the store keeps files there is something else: its database takes everything but them."""
    (tmp_path / "mlartifacts").write_text("in the way")
    (tmp_path / "a.txt").write_text("a")
    sink = MlflowSink(TrackingConfig(system_metrics_every_s=None), "n", tmp_path / "run", resume_step=0)
    sink.artifact(tmp_path / "a.txt")
    sink.metrics(1, {"loss": 1.0})
    client, uri = client_of(sink.uri), sink.uri
    end = time.monotonic() + 60
    while sink.run_id is None and time.monotonic() < end:
        time.sleep(0.1)
    sink.metrics(2, {"loss": 2.0})
    assert sink.finish(timeout_s=60) == 1
    assert history(client, sink.run_id, "loss") == [(1, 1.0), (2, 2.0)] and client.get_run(sink.run_id).info.status == "FINISHED"
    (folder,) = spools_of(tmp_path / "run")
    assert num_waiting(folder) == 1 == waiting_of(tmp_path / "run").left
    (tmp_path / "mlartifacts").unlink()
    again = MlflowSink(TrackingConfig(mlflow_uri=uri), "n", tmp_path / "run")
    assert again.finish(None, timeout_s=60) == 0 and not spools_of(tmp_path / "run")
    assert [f.path for f in client.list_artifacts(sink.run_id)] == ["a.txt"]
