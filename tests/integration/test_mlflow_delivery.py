"""The process that delivers records to MLflow: what it does when training, the server or it itself dies."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from megavlm.config.schema import TrackingConfig
from megavlm.testing.mlflow_server import free_port
from megavlm.tracking import mlflow_sink
from megavlm.tracking.mlflow_sink import MlflowSink
from megavlm.tracking.mlflow_store import TrackingError
from megavlm.tracking.spool import SpoolReader
from tests.integration.test_mlflow_stores import client_of, history

mlflow = pytest.importorskip("mlflow")


@pytest.fixture(autouse=True)
def no_inherited_store(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.slow
def test_a_killed_training_leaves_no_process_and_no_point_behind(tmp_path):
    code = """
        import os, sys, time
        from megavlm.config.schema import TrackingConfig
        from megavlm.tracking.mlflow_sink import MlflowSink
        sink = MlflowSink(TrackingConfig(), "n", sys.argv[1], resume_step=0)
        while sink.run_id is None:
            time.sleep(0.1)
        for step in range(1, 101):
            sink.metrics(step, {"loss": 1.0})
        print(sink.process_id, flush=True)
        os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a")], capture_output=True, text=True, timeout=120)
    assert done.returncode == -9
    delivering = int(done.stdout)
    end = time.monotonic() + 30
    while is_alive(delivering):
        assert time.monotonic() < end, "the delivering process outlives training"
        time.sleep(0.1)
    run_id = (tmp_path / "a" / "mlflow_run_id").read_text().strip()
    client = client_of(f"sqlite:///{tmp_path}/mlflow.db")
    if len(client.get_metric_history(run_id, "loss")) < 100:  # its last three seconds were too few on a busy machine
        MlflowSink(TrackingConfig(), "n", tmp_path / "a").finish(None, timeout_s=60)
    assert history(client, run_id, "loss") == [(s, 1.0) for s in range(1, 101)]


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_signals_for_training_do_not_end_delivery_and_a_killed_delivery_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_sink, "RESTART_AFTER_S", 0.1)
    sink = MlflowSink(TrackingConfig(), "n", tmp_path / "a")
    while sink.run_id is None:
        time.sleep(0.1)
    first = sink.process_id
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        os.kill(first, number)
    sink.metrics(1, {"loss": 1.0})
    time.sleep(0.5)
    assert is_alive(first) and sink.process_id == first
    os.kill(first, signal.SIGKILL)
    sink.metrics(2, {"loss": 0.5})
    end = time.monotonic() + 30
    while sink.process_id == first and time.monotonic() < end:
        time.sleep(0.1)
    assert sink.process_id != first and sink.finish() == 0
    assert history(client_of(sink.uri), sink.run_id, "loss") == [(1, 1.0), (2, 0.5)]


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
        # A user's own patience with servers must not become the exit's: a request still waiting then would show as a minute.
        patient = {**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=patient)
        exit_s = time.time() - float(done.stdout.split()[3])
    finish_s = float(done.stdout.split()[3]) - float(done.stdout.split()[1])
    # 3 s and next to nothing; the margins are for a busy machine.
    assert finish_s < 4.5 and exit_s < 5, (finish_s, exit_s)
    kept, bad, _ = SpoolReader(tmp_path / "mlflow-spool").peek(1000)
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
    kept, _, _ = SpoolReader(tmp_path / "mlflow-spool").peek(10)
    assert [i.get("step", i.get("status")) for i in kept] == [1, "FAILED"]


def test_after_the_end(tmp_path):
    sink = MlflowSink(TrackingConfig(mlflow_uri=f"http://127.0.0.1:{free_port()}"), "n", tmp_path)
    with pytest.raises(TrackingError, match="DONE"):
        sink.finish("DONE")
    assert sink.finish(timeout_s=0.1) == 1 == sink.finish()
    with pytest.raises(TrackingError, match="after finish"):
        sink.metrics(1, {"loss": 1.0})


@pytest.mark.parametrize(("resume_step", "kept"), [(0, ["tags", 9]), (5, [1, 8, "tags", 9]), (None, [1, 8, "tags", "FAILED", 9])])
def test_what_an_earlier_start_left_goes_on_unless_training_begins_anew(tmp_path, resume_step, kept):
    config = TrackingConfig(mlflow_uri=f"http://127.0.0.1:{free_port()}")
    first = MlflowSink(config, "n", tmp_path, resume_step=0)
    for step in (1, 8):
        first.metrics(step, {"loss": 1.0})
    first.tags({"a": "b"})
    first.finish("FAILED", timeout_s=0.1)
    second = MlflowSink(config, "n", tmp_path, resume_step=resume_step)
    second.metrics(9, {"loss": 1.0})
    second.finish(None, timeout_s=0.1)
    found = [item.get("step", item.get("status", item["kind"])) for item in SpoolReader(tmp_path / "mlflow-spool").peek(99)[0]]
    assert found == kept
