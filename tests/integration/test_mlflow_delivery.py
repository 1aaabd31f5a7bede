"""The process that delivers records to MLflow: what it does when training, the server or it itself dies."""

import contextlib
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
from megavlm.testing.mlflow_server import DEAD_SERVER
from megavlm.testing.spools import spooled
from megavlm.tracking import mlflow_sink
from megavlm.tracking.mlflow_sink import MlflowSink
from megavlm.tracking.mlflow_store import TrackingError
from megavlm.tracking.spool_folders import SPOOL_FOLDER, spools_of
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
    assert sink.process_id != first and sink.finish(timeout_s=60) == 0
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
    assert sorted(i["step"] for i in spooled(tmp_path) if i["kind"] == "metrics") == list(range(1, 102))
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
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), DEAD_SERVER, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1 and "boom" in done.stderr
    assert [i.get("step", i.get("status")) for i in spooled(tmp_path)] == [1, "FAILED"]


PARENT = """
    import os, sys, time
    from pathlib import Path
    from megavlm.config.schema import TrackingConfig
    from megavlm.tracking import mlflow_sink
    from megavlm.tracking.spool_folders import DELIVERY_LOCK, SpoolLock
    state, uri, run_dir = sys.argv[1:]
    make = mlflow_sink.make_spool
    if state == "waits for the lock":  # which another process has, as far as it can see
        def taken(run_dir, label):
            folder, held = make(run_dir, label)
            if not os.fork():
                lock = SpoolLock.take(folder / DELIVERY_LOCK)
                print("locked", flush=True)
                time.sleep(60)
            time.sleep(0.5)
            return folder, held
        mlflow_sink.make_spool = taken
    node = mlflow_sink.Node(1, 2) if state == "waits for the first node" else None
    sink = mlflow_sink.MlflowSink(TrackingConfig(mlflow_uri=uri), "n", run_dir, node=node)
    sink.metrics(1, {"loss": 1.0})
    if state == "has a pipe that another process keeps open" and not os.fork():
        time.sleep(60)
    print(sink.process_id, flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_killed_training_is_outlived_by_three_seconds_in_every_state(tmp_path):
    """A user's own patience with servers, a minute here, must not become that of a process whose training is dead."""
    states = ("opens a frozen server", "waits for the lock", "waits for the first node", "has a pipe that another process keeps open")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)  # the kernel accepts, nobody ever answers
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        environment = {**os.environ, "MLFLOW_HTTP_REQUEST_TIMEOUT": "60"}
        command = [sys.executable, "-c", textwrap.dedent(PARENT)]
        options = {"stdout": subprocess.PIPE, "env": environment, "text": True, "start_new_session": True}
        parents = [subprocess.Popen([*command, state, uri, str(tmp_path / str(i))], **options) for i, state in enumerate(states)]
        try:
            delivering = [next(int(line) for line in parent.stdout if line.strip().isdigit()) for parent in parents]
            time.sleep(4.0)  # the import of mlflow, and into the request that is never answered
            assert all(is_alive(number) for number in delivering)
            for parent in parents:
                os.kill(parent.pid, signal.SIGKILL)
            killed, outlived = time.monotonic(), {}
            while len(outlived) < len(states) and time.monotonic() < killed + 20:
                for state, number in zip(states, delivering, strict=True):
                    if state not in outlived and not is_alive(number):
                        outlived[state] = time.monotonic() - killed
                time.sleep(0.05)
        finally:
            for parent in parents:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(parent.pid, signal.SIGKILL)
                parent.communicate()
    assert set(outlived) == set(states) and max(outlived.values()) < 5.0, outlived  # 3 s, and a busy machine


@pytest.mark.slow
def test_a_slow_sqlite_store_does_not_hold_up_the_exit_and_has_all_in_the_end(tmp_path):
    """The lock that programs take while they make the store's tables is held here, as if another one took its time."""
    from filelock import FileLock

    code = """
        import sys, time
        from megavlm.config.schema import TrackingConfig
        from megavlm.tracking.mlflow_sink import MlflowSink
        sink = MlflowSink(TrackingConfig(), "n", sys.argv[1], resume_step=0)
        for step in range(1, 101):
            sink.metrics(step, {"loss": 1.0})
        print("ending", time.time(), flush=True)
        sink.finish()
        print("finished", time.time(), flush=True)
        print("pid", sink.process_id, flush=True)
    """
    with FileLock(tmp_path / "mlflow.db.lock"):
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a")]
        # Its output is read to the end, as a pipe into another program does: what goes on behind it must not keep that open.
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        began, finished, delivering = (float(word) for word in done.stdout.split()[1::2])
        # 3 s, and the interpreter's own end on a busy machine: far from the 30 s that the other process may take.
        assert finished - began < 4.5 and time.time() - began < 10, (finished - began, time.time() - began)
        assert "sends them within 30 s" in done.stderr and is_alive(int(delivering))
    end = time.monotonic() + 40
    while (tmp_path / "a" / SPOOL_FOLDER).exists() and time.monotonic() < end:
        time.sleep(0.05)
    run_id = (tmp_path / "a" / "mlflow_run_id").read_text().strip()
    client = client_of(f"sqlite:///{tmp_path}/mlflow.db")
    assert history(client, run_id, "loss") == [(s, 1.0) for s in range(1, 101)]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert not spools_of(tmp_path / "a")


def test_after_the_end(tmp_path):
    sink = MlflowSink(TrackingConfig(mlflow_uri=DEAD_SERVER), "n", tmp_path)
    with pytest.raises(TrackingError, match="DONE"):
        sink.finish("DONE")
    assert sink.finish(timeout_s=0.1) == 1 == sink.finish()
    with pytest.raises(TrackingError, match="after finish"):
        sink.metrics(1, {"loss": 1.0})


@pytest.mark.parametrize(("resume_step", "kept"), [(0, ["tags", 9]), (5, [1, 8, "tags", 9]), (None, [1, 8, "tags", "FAILED", 9])])
def test_what_an_earlier_start_left_goes_on_unless_training_begins_anew(tmp_path, resume_step, kept):
    config = TrackingConfig(mlflow_uri=DEAD_SERVER)
    first = MlflowSink(config, "n", tmp_path, resume_step=0)
    for step in (1, 8):
        first.metrics(step, {"loss": 1.0})
    first.tags({"a": "b"})
    first.finish("FAILED", timeout_s=0.1)
    second = MlflowSink(config, "n", tmp_path, resume_step=resume_step)
    second.metrics(9, {"loss": 1.0})
    second.finish(None, timeout_s=0.1)
    found = [item.get("step", item.get("status", item["kind"])) for item in spooled(tmp_path)]
    assert found == kept
