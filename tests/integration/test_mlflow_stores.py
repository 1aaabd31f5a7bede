"""MLflow for real: a sqlite store, a server in another process, a frozen and a dead one; read back with MLflow's own client."""

import math
import os
import shlex
import subprocess
import sys
import textwrap
import time
import urllib.request
from pathlib import Path

import pytest

from megavlm.config.load import dump_recipe
from megavlm.config.schema import Recipe, TrackingConfig
from megavlm.testing.mlflow_server import ADMIN_PASSWORD, DEAD_SERVER, MlflowServer
from megavlm.tracking.mlflow_sink import MlflowSink
from megavlm.tracking.spool_folders import SPOOL_FOLDER, waiting_of
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
    program, *arguments = shlex.split(tracker.how_to_open())
    assert program == "mlflow"
    with MlflowServer(folder, arguments) as found:
        yield found


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
    if recipe.tracking.mlflow_uri is None:
        wait_for_the_end(recipe)
    return tracker


def wait_for_the_end(recipe: Recipe) -> None:
    """On a busy machine a short run ends before its delivering process does."""
    end = time.monotonic() + 60
    while (Path(recipe.run.dir) / SPOOL_FOLDER).exists() and time.monotonic() < end:
        time.sleep(0.05)


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
    train(recipe_for(run_dir, DEAD_SERVER), 0, 8)
    assert waiting_of(run_dir).left > 8 and not (run_dir / "mlflow_run_id").exists()
    tracker = train(recipe_for(run_dir, server.uri), 5, 10, connected=True)
    replay(run_dir, recipe_for(run_dir, server.uri))  # what a slow machine did not send by now
    client, run_id = client_of(server.uri), (run_dir / "mlflow_run_id").read_text().strip()
    assert history(client, run_id, "loss") == [(s, 1 / s) for s in range(1, 11)], "6-8 were made twice, and came out the same"
    assert "curves.png" in {f.path for f in client.list_artifacts(run_id)}
    assert client.get_run(run_id).info.status == "FINISHED"
    page = tracker.how_to_open()
    assert page.startswith(f"{server.uri}/#/experiments/") and page.endswith(run_id)
    assert not (run_dir / "mlflow-spool").exists()


def replay(
    run_dir: Path, recipe: Recipe, environment: dict[str, str] | None = None, timeout_s: int = 60
) -> subprocess.CompletedProcess[str]:
    """`megavlm track replay`."""
    dump_recipe(recipe, run_dir / "recipe.yaml")
    command = [sys.executable, "-m", "megavlm.cli", "track", "replay", str(run_dir), "--timeout", str(timeout_s)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **(environment or {})})


@pytest.mark.slow
def test_a_server_frozen_thawed_killed_and_started_again_has_every_point_once(tmp_path):
    """The whole life of a server under one run: no point lost, none doubled, `track replay` brings the last."""
    run_dir = tmp_path / "a"
    with MlflowServer(tmp_path) as server:
        config = TrackingConfig(mlflow_uri=server.uri, experiment="tests", system_metrics_every_s=None)
        sink = MlflowSink(config, "n", run_dir, resume_step=0)
        step, keys = 0, {f"m{i}": 1.0 for i in range(20)}

        def go_on(seconds):
            nonlocal step
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                step += 1
                sink.metrics(step, {"loss": 1 / step, **keys})
                time.sleep(0.01)

        while sink.run_id is None:
            go_on(0.1)
        go_on(0.5)
        server.freeze()
        go_on(7.0)  # longer than a request waits: it is sent again, whether it arrived or not
        server.thaw()
        go_on(1.0)
        server.kill()
        go_on(1.5)
        server.start()
        go_on(0.5)
        server.kill()
        began = time.monotonic()
        left = sink.finish()
        assert time.monotonic() - began < 4.5 and left > 0
        server.start()
        done = replay(run_dir, recipe_for(run_dir, server.uri))
        assert done.returncode == 0 and "records sent" in done.stdout, done.stderr
        client = client_of(server.uri)
        assert history(client, sink.run_id, "loss") == [(s, 1 / s) for s in range(1, step + 1)]
        assert history(client, sink.run_id, "m19") == [(s, 1.0) for s in range(1, step + 1)]
        assert client.get_run(sink.run_id).info.status == "FINISHED"
        assert "nothing waits" in replay(run_dir, recipe_for(run_dir, server.uri)).stdout


@pytest.mark.slow
def test_a_server_with_passwords(tmp_path, monkeypatch):
    pytest.importorskip("flask_wtf")
    run_dir = tmp_path / "a"
    with MlflowServer(tmp_path, auth=True) as server:
        recipe = recipe_for(run_dir, server.uri)
        train(recipe, 0, 3)
        assert waiting_of(run_dir).left > 3
        start = time.monotonic()
        refused = replay(run_dir, recipe, timeout_s=110)
        assert time.monotonic() - start < 80, "a no is an answer"
        assert refused.returncode == 1 and "does not take records" in refused.stderr + refused.stdout
        named = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": ADMIN_PASSWORD}
        assert replay(run_dir, recipe, named).returncode == 0
        for name, value in named.items():
            monkeypatch.setenv(name, value)
        run_id = (run_dir / "mlflow_run_id").read_text().strip()
        assert history(client_of(server.uri), run_id, "loss") == [(s, 1 / s) for s in (1, 2, 3)]
        train(recipe, 3, 5, connected=True)
        replay(run_dir, recipe)
        assert history(client_of(server.uri), run_id, "loss") == [(s, 1 / s) for s in range(1, 6)]
        for path in run_dir.rglob("*"):
            assert path.is_dir() or ADMIN_PASSWORD.encode() not in path.read_bytes(), f"the password is in {path}"


@pytest.mark.slow
def test_every_node_sends_its_system_metrics_into_one_run(tmp_path, monkeypatch):
    run_dir = tmp_path / "a"
    tracking = {"experiment": "tests", "system_metrics_every_s": 0.2}
    recipe = recipe_for(run_dir)
    recipe = recipe.model_copy(update={"tracking": TrackingConfig.model_validate(tracking)})
    trackers = []
    for rank in (0, 2):
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        trackers.append(Tracker(recipe, rank, 4, interactive=False))
    for tracker in trackers:
        tracker.start(0)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    wanted = {f"system/node-{n}/cpu_utilization_percentage" for n in (0, 1)}
    end, step, found = time.monotonic() + 150, 0, set()
    while not wanted <= found and time.monotonic() < end:
        step += 1
        for tracker in trackers:
            tracker.step({"step": step, "stage": "align", "stage_step": step, "loss": 1.0})
        time.sleep(0.5)
        if (run_dir / "mlflow_run_id").exists():
            found = set(client_of(uri).get_run((run_dir / "mlflow_run_id").read_text().strip()).data.metrics)
    for tracker in reversed(trackers):
        tracker.finish()
    wait_for_the_end(recipe)
    assert wanted <= found, found
    assert not list(run_dir.glob("mlflow-spool*"))


def test_a_table_and_a_model_with_a_version(tmp_path, server, monkeypatch):
    (tmp_path / "table.json").write_text('{"columns": ["task", "right"], "data": [["ocr", 0.5]]}')
    model = tmp_path / "hf"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "x"}')
    config = TrackingConfig(mlflow_uri=server.uri, experiment="tests")
    client = client_of(server.uri)
    for number, text in ((1, "{}"), (1, "{}"), (2, "{ }")):  # the same folder again is the same version
        more = model / "more.json"
        if not more.exists() or more.read_text() != text:
            more.write_text(text)
        sink = MlflowSink(config, "n", tmp_path / "a")
        sink.table(tmp_path / "table.json", "evaluation")
        sink.model(model, "the model's name")
        assert sink.finish(timeout_s=60) == 0
        found = {v.version: v for v in client.search_model_versions() if v.name == "the model's name"}
        assert sorted(map(int, found)) == list(range(1, number + 1)) and found[str(number)].run_id == sink.run_id
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)  # load_table asks it, whatever its client was given
    frame = client.load_table(client.get_run(sink.run_id).info.experiment_id, "evaluation/table.json", [sink.run_id])
    assert frame.to_dict("list") == {"task": ["ocr"], "right": [0.5]}
    loaded = mlflow.artifacts.download_artifacts(artifact_uri="models:/the model's name/2", tracking_uri=server.uri, dst_path=str(tmp_path))
    assert (Path(loaded) / "config.json").read_text() == '{"model_type": "x"}'
