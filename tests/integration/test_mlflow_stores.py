"""MLflow for real: a sqlite store, a server in another process, a frozen and a dead one; read back with MLflow's own client."""

import math
import os
import shlex
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from megavlm.config.schema import Recipe, TrackingConfig
from megavlm.tracking.mlflow_sink import MlflowSink, deliver_spool
from megavlm.tracking.spool import Spool
from megavlm.tracking.tracker import Tracker

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def no_inherited_store(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real MLflow server, started with the very command that a run recommends."""
    folder = tmp_path_factory.mktemp("server")
    tracker = train(recipe_for(folder / "first"), 0, 3)
    with MlflowServer(folder, tracker.how_to_open()) as found:
        yield found


class MlflowServer:
    """`mlflow ui` on a free port, ended with the process group it leads (it has worker processes)."""

    def __init__(self, folder: Path, command: str):
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        program, *arguments = shlex.split(command)
        assert program == "mlflow"
        self.command = [sys.executable, "-m", "mlflow", *arguments, "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]

    def __enter__(self):
        self.log = open(self.folder / "server.log", "wb")
        environment = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            self.command, stdout=self.log, stderr=subprocess.STDOUT, cwd=self.folder, start_new_session=True, env=environment
        )
        end = time.monotonic() + 240
        try:
            while not self._answers():
                assert self.process.poll() is None and time.monotonic() < end, (self.folder / "server.log").read_text()[-3000:]
                time.sleep(0.25)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _answers(self):
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        except OSError:
            return False

    def __exit__(self, *_):
        os.killpg(self.process.pid, 9)  # asked politely, it takes ten seconds over it
        self.process.wait(10)
        self.log.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def recipe_for(run_dir: Path, uri: str | None = None, lr: float = 1e-3) -> Recipe:
    stages = [{"name": n, "steps": 20, "mixture": {"pages": 1}, "optimizer": {"lr": lr}} for n in ("align", "instruct")]
    sources = {"pages": {"path": "data/pages"}}
    tracking = {"mlflow_uri": uri, "experiment": "tests"}
    return Recipe.model_validate(
        {"run": {"dir": str(run_dir), "name": "n"}, "data": {"sources": sources}, "stages": stages, "tracking": tracking}
    )


def train(recipe: Recipe, first: int, last: int, picture: Path | None = None, connected: bool = False) -> Tracker:
    with Tracker(recipe, interactive=False) as tracker:
        tracker.start(first)
        end = time.monotonic() + 60  # a run longer than a busy machine takes to connect
        while connected and tracker._mlflow.run_id is None and time.monotonic() < end:
            time.sleep(0.1)
        tracker.stage_begins("align", 20, first)
        for step in range(first + 1, last + 1):
            tracker.step(
                {
                    "step": step,
                    "stage": "align",
                    "stage_step": step,
                    "loss": 1 / step,
                    "lr": {"projector": 1e-3},
                    "task_loss": {"caption": 2.0},
                }
            )
        tracker.evaluation({"step": last, "loss": {"held": 0.5}})
        if picture is not None:
            tracker.picture("align/sample", picture)
    return tracker


def client_of(uri: str):
    return mlflow.MlflowClient(tracking_uri=uri)


def history(client, run_id: str, key: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run_id, key))


def test_sqlite_run_resumed_with_a_changed_recipe(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs here" / "a"
    (tmp_path / "sample.png").write_bytes(b"not really a picture")
    (run_dir).mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text("run: {}\n")
    tracker = train(recipe_for(run_dir), 0, 10, tmp_path / "sample.png")
    uri = f"sqlite:///{tmp_path}/runs here/mlflow.db"
    assert tracker.how_to_open() == f"mlflow ui --backend-store-uri '{uri}'"
    client, run_id = client_of(uri), (run_dir / "mlflow_run_id").read_text().strip()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.info.run_name == "n"
    assert history(client, run_id, "loss") == [(s, 1 / s) for s in range(1, 11)] == history(client, run_id, "stage_loss/align")
    assert {"lr/projector", "task_loss/caption", "evaluation/loss/held"} <= set(run.data.metrics)
    assert run.data.params["stages.align.optimizer.lr"] == "0.001" and run.data.params["model.vision.patch_size_px"] == "14"
    files = {f.path for f in client.list_artifacts(run_id)} | {f.path for f in client.list_artifacts(run_id, "pictures/align")}
    assert {"recipe.yaml", "environment.json", "curves.png", "pictures/align/sample.png"} <= files

    train(recipe_for(run_dir, lr=5e-4), 6, 12)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.tags["recipe.stages.align.optimizer.lr"] == "0.0005"
    assert run.data.params["stages.align.optimizer.lr"] == "0.001" and run.data.tags["resume_step"] == "6"
    assert {s for s, _ in history(client, run_id, "loss")} == set(range(1, 13))

    train(recipe_for(run_dir), 0, 2)  # anew: points cannot be taken back, so another MLflow run
    anew = (run_dir / "mlflow_run_id").read_text().strip()
    assert anew != run_id and client.get_run(anew).data.tags["earlier_run"] == run_id
    assert [s for s, _ in history(client, anew, "loss")] == [1, 2]
    assert not (tmp_path / "mlruns").exists(), "MLflow's default folder for files, in whatever folder one happens to be"
    assert "Creating initial MLflow database tables" not in capfd.readouterr().err


def test_more_than_a_batch_and_numbers_that_are_not_finite(tmp_path):
    sink = MlflowSink(TrackingConfig(), "n", tmp_path / "a", recipe={f"k{i}": i for i in range(250)})
    for step in range(1, 61):
        sink.metrics(step, {f"m{i}": float(step) for i in range(40)} | {"nan": math.nan, "inf": math.inf})
    sink.tags({f"t{i}": i for i in range(230)})
    sink.finish(timeout_s=60)
    client = client_of(sink.uri)
    run = client.get_run(sink.run_id)
    assert len(run.data.params) == 250 and run.data.tags["t229"] == "229"
    assert [s for s, _ in history(client, sink.run_id, "m39")] == list(range(1, 61))
    assert math.isnan(run.data.metrics["nan"]) and run.data.metrics["inf"] > 1e308


def test_two_processes_make_one_fresh_store(tmp_path):
    code = """
        import sys
        from megavlm.config.schema import TrackingConfig
        from megavlm.tracking.mlflow_sink import MlflowSink
        sink = MlflowSink(TrackingConfig(), "n", sys.argv[1])
        sink.metrics(1, {"loss": 1.0})
        sink.finish(timeout_s=100)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    both = [subprocess.Popen([*command, str(tmp_path / name)], stderr=subprocess.PIPE, text=True) for name in "ab"]
    errors = [process.communicate(timeout=120)[1] for process in both]
    assert [p.returncode for p in both] == [0, 0] and "does not answer" not in "".join(errors), errors
    client = client_of(f"sqlite:///{tmp_path}/mlflow.db")
    for name in "ab":
        assert client.get_run((tmp_path / name / "mlflow_run_id").read_text().strip()).data.metrics == {"loss": 1.0}


def test_the_recommended_command_shows_metrics_and_pictures(server):
    run_id = (server.folder / "first" / "mlflow_run_id").read_text().strip()
    assert history(client_of(server.uri), run_id, "loss") == [(s, 1 / s) for s in (1, 2, 3)]
    picture = urllib.request.urlopen(f"{server.uri}/get-artifact?run_uuid={run_id}&path=curves.png", timeout=30).read()
    assert picture == (server.folder / "first" / "curves.png").read_bytes()


def test_a_server_that_comes_late_gets_the_spool(tmp_path, server):
    run_dir = tmp_path / "a"
    train(recipe_for(run_dir, f"http://127.0.0.1:{free_port()}"), 0, 8)
    assert len(Spool(run_dir / "mlflow-spool.jsonl")) > 8 and not (run_dir / "mlflow_run_id").exists()
    tracker = train(recipe_for(run_dir, server.uri), 5, 10, connected=True)
    if (run_dir / "mlflow-spool.jsonl").exists():  # a slow machine: the rest goes out with the next start
        assert deliver_spool(recipe_for(run_dir, server.uri), timeout_s=60) == 0
    client, run_id = client_of(server.uri), (run_dir / "mlflow_run_id").read_text().strip()
    assert history(client, run_id, "loss") == [(s, 1 / s) for s in range(1, 11)], "steps 6-8 of the first attempt must be gone"
    assert "curves.png" in {f.path for f in client.list_artifacts(run_id)}
    assert client.get_run(run_id).info.status == "FINISHED"
    page = tracker.how_to_open()
    assert page.startswith(f"{server.uri}/#/experiments/") and page.endswith(run_id)


def test_a_wrong_name_is_put_aside_by_a_real_server(tmp_path, server):
    config = TrackingConfig(mlflow_uri=server.uri, experiment="tests")
    sink = MlflowSink(config, "n", tmp_path)
    sink.metrics(1, {"loss": 1.0})
    sink._put({"kind": "metrics", "step": 2, "time_ms": 1, "values": {"": 1.0}})
    sink.metrics(3, {"loss": 3.0})
    sink.finish(timeout_s=60)
    assert history(client_of(server.uri), sink.run_id, "loss") == [(1, 1.0), (3, 3.0)]
    assert (tmp_path / "mlflow-rejected.jsonl").read_text().count("\n") == 1


@pytest.mark.parametrize("kind", ["frozen", "dead"])
def test_a_server_that_does_not_answer_does_not_hold_up_the_exit(tmp_path, kind):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "frozen":
            listener.listen(50)  # the kernel accepts, nobody ever answers
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        code = """
            import sys, time
            from megavlm.config.schema import TrackingConfig
            from megavlm.tracking.mlflow_sink import MlflowSink
            import mlflow  # its import time is not the subject
            sink = MlflowSink(TrackingConfig(mlflow_uri=sys.argv[1]), "n", sys.argv[2])
            for step in range(1, 101):
                sink.metrics(step, {"loss": 1.0})
            time.sleep(1.5)
            sink.metrics(101, {"loss": 1.0})
            print("ending", time.time(), flush=True)
            sink.finish()
            print("finished", time.time(), flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(code), uri, str(tmp_path)]
        # A user's own patience with servers must not become the exit's: a thread still waiting then would show as a minute.
        patient = {**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=patient)
        exit_s = time.time() - float(done.stdout.split()[3])
    finish_s = float(done.stdout.split()[3]) - float(done.stdout.split()[1])
    # 3 s and next to nothing; the margins are for a busy machine.
    assert finish_s < 4.5 and exit_s < 15, (finish_s, exit_s)
    kept, bad, _ = Spool(tmp_path / "mlflow-spool.jsonl").peek(1000)
    assert sorted(i["step"] for i in kept if i["kind"] == "metrics") == list(range(1, 102)) and not bad
    assert "records wait for MLflow" in done.stderr


def test_a_program_that_dies_without_finish_keeps_its_records(tmp_path):
    code = """
        import sys
        from megavlm.config.schema import TrackingConfig
        from megavlm.tracking.mlflow_sink import MlflowSink
        sink = MlflowSink(TrackingConfig(mlflow_uri=sys.argv[1]), "n", sys.argv[2])
        sink.metrics(1, {"loss": 1.0})
        raise KeyError("boom")
    """
    uri = f"http://127.0.0.1:{free_port()}"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), uri, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "boom" in done.stderr
    kept, _, _ = Spool(tmp_path / "mlflow-spool.jsonl").peek(10)
    assert [i.get("step", i.get("status")) for i in kept] == [1, "FAILED"]
