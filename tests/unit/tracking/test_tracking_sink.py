"""The sink's thread against a store that blocks, fails, refuses: no wait in training, nothing lost, the program ends."""

import logging
import threading
import time

import pytest

from megavlm.config.schema import Recipe, TrackingConfig
from megavlm.tracking import mlflow_sink
from megavlm.tracking.mlflow_sink import MAX_QUEUED, MlflowSink, deliver_spool
from megavlm.tracking.mlflow_store import Rejected, TrackingError, artifact_location, how_to_open, param_values, store_key, tracking_uri
from megavlm.tracking.mlflow_store import without_password as redact
from megavlm.tracking.spool import Spool


class FakeStore:
    """Stands for MLflow: takes everything, unless told to fail, refuse or block."""

    def __init__(self):
        self.run_id, self.experiment_id = None, None
        self.is_open, self.down, self.refuse, self.cancelled = False, False, (), False
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.taken, self.tries, self.on_try = [], 0, lambda: None

    def _answer(self):
        self.tries += 1
        self.on_try()
        self.entered.set()
        self.gate.wait(30)
        if self.down:
            raise ConnectionError("http://user:pass@host refused")

    def open(self):
        self._answer()
        self.run_id, self.is_open = "r1", True

    def send(self, items):
        self._answer()
        if bad := [i for i in items if i["kind"] == "metrics" and i["step"] in self.refuse]:
            raise Rejected(f"steps {[i['step'] for i in bad]}")
        self.taken += items

    def steps(self):
        return sorted({i["step"] for i in self.taken if i["kind"] == "metrics"})

    def statuses(self):
        return [i["status"] for i in self.taken if i["kind"] == "status"]


@pytest.fixture
def store(monkeypatch):
    found = FakeStore()
    monkeypatch.setattr(mlflow_sink, "MlflowStore", lambda *a, **k: found)
    monkeypatch.setattr(mlflow_sink, "DELIVER_EVERY_S", 0.01)
    monkeypatch.setattr(mlflow_sink, "RETRY_AFTER_S", (0.01,))
    yield found
    found.gate.set()


@pytest.fixture
def warnings(monkeypatch):
    """Messages of the sink's own logger. caplog would hear them twice, or not at all, after a test that called setup_logging."""
    messages = []
    monkeypatch.setattr(
        mlflow_sink._log, "filters", [lambda record: record.levelno < logging.WARNING or messages.append(record.getMessage()) or True]
    )
    return messages


def make(tmp_path, **options):
    return MlflowSink(TrackingConfig(mlflow_uri="http://127.0.0.1:1"), "name", tmp_path / "run", **options)


def wait_for(condition):
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "did not happen in 10 s"
        time.sleep(0.005)


def test_everything_arrives_in_order_with_its_status(tmp_path, store):
    sink = make(tmp_path)
    for step in range(1, 1201):
        sink.metrics(step, {"loss": 1.0})
    sink.tags({"stage": "align", "n": 3})
    sink.artifact(tmp_path)
    sink.finish("KILLED")
    assert [i["step"] for i in store.taken if i["kind"] == "metrics"] == list(range(1, 1201))
    assert store.taken[-1]["status"] == "KILLED" and store.taken[-3]["values"] == {"stage": "align", "n": "3"}
    assert not (tmp_path / "run" / "mlflow-spool.jsonl").exists()


def test_putting_never_waits_for_a_stuck_server_and_overflow_is_spooled(tmp_path, store):
    store.gate.clear()
    sink = make(tmp_path)
    assert store.entered.wait(10)  # the thread is stuck in the store from here on
    for step in range(1, MAX_QUEUED + 51):
        sink.metrics(step, {"loss": 1.0})
    # All puts came back while nobody took anything: the queue is full, the rest is on disk.
    assert not store.taken and len(sink._queue) == MAX_QUEUED and len(Spool(tmp_path / "run" / "mlflow-spool.jsonl")) == 50
    store.gate.set()
    sink.finish(timeout_s=30)
    assert store.steps() == list(range(1, MAX_QUEUED + 51))


def test_finish_leaves_a_stuck_server_alone_and_the_next_start_delivers(tmp_path, store):
    sink = make(tmp_path)
    sink.metrics(1, {"loss": 1.0})
    wait_for(lambda: store.steps() == [1])
    store.gate.clear()
    store.entered.clear()
    sink.metrics(2, {"loss": float("nan")})
    assert store.entered.wait(10)  # step 2 is in flight: whether it arrives is unknown
    sink.metrics(3, {"loss": 3.0})
    began = time.monotonic()
    sink.finish(timeout_s=0.2)
    assert time.monotonic() - began < 2.0
    kept, _, _ = Spool(tmp_path / "run" / "mlflow-spool.jsonl").peek(100)
    assert [i.get("step", i.get("status")) for i in kept] == [2, 3, "FINISHED"]

    store.down = True  # the stuck thread of the first sink gets its answer: a failure, after everything was put away
    store.gate.set()
    sink._thread.join(10)
    assert store.cancelled and len(Spool(tmp_path / "run" / "mlflow-spool.jsonl")) == 3, "the late thread must not add a second copy"
    store.down = False
    second = make(tmp_path)
    second.finish()
    assert store.steps() == [1, 2, 3] and not (tmp_path / "run" / "mlflow-spool.jsonl").exists()


def test_a_dead_server_is_reported_once_and_gets_all_when_it_is_back(tmp_path, store, warnings):
    store.down = True
    sink = make(tmp_path)
    for step in range(1, 6):
        sink.metrics(step, {"loss": 1.0})
    wait_for(lambda: store.tries > 5)
    wait_for(lambda: not sink._queue)
    assert len(warnings) == 1 and "does not answer" in warnings[0] and "user:pass" not in warnings[0]
    assert len(Spool(tmp_path / "run" / "mlflow-spool.jsonl")) == 5  # on disk already: a kill -9 now loses nothing
    store.down = False
    wait_for(lambda: store.steps() == [1, 2, 3, 4, 5])
    sink.finish()
    assert store.statuses() == ["FINISHED"] and not (tmp_path / "run" / "mlflow-spool.jsonl").exists()


def test_a_dead_server_is_not_asked_all_the_time(tmp_path, store, monkeypatch):
    monkeypatch.setattr(mlflow_sink, "RETRY_AFTER_S", (2.0, 60.0))
    now = [0.0]
    rounds = [0]

    def clock():
        rounds[0] += 1
        return now[0]

    store.down = True
    sink = make(tmp_path, clock=clock)
    wait_for(lambda: store.tries == 1 and rounds[0] > 10)
    assert store.tries == 1
    now[0] = 2.5
    wait_for(lambda: store.tries == 2)
    now[0] = 60.0
    seen = rounds[0]
    wait_for(lambda: rounds[0] > seen + 10)
    assert store.tries == 2, "the second pause is 60 s"
    sink.finish()
    assert store.tries == 3, "the end is worth one more try"


def test_refused_records_are_put_aside_and_the_others_taken(tmp_path, store):
    store.refuse = (3,)
    sink = make(tmp_path)
    for step in range(1, 6):
        sink.metrics(step, {"loss": 1.0})
    sink.finish()
    assert store.steps() == [1, 2, 4, 5] and store.statuses() == ["FINISHED"]
    rejected = (tmp_path / "run" / "mlflow-rejected.jsonl").read_text()
    assert rejected.count("\n") == 1 and "steps [3]" in rejected and '\\"step\\": 3' in rejected


def test_a_resumed_run_drops_what_it_will_make_again(tmp_path, store):
    spool = Spool(tmp_path / "run" / "mlflow-spool.jsonl")
    spool.append([{"kind": "metrics", "step": s, "time_ms": 1, "values": {"loss": 1.0}} for s in (4, 5, 6)])
    spool.append([{"kind": "status", "status": "FAILED", "time_ms": 1}, {"kind": "tags", "values": {"a": "b"}}])
    sink = make(tmp_path, resume_step=5)
    wait_for(lambda: not spool.path.exists())
    assert store.steps() == [4, 5] and store.statuses() == []
    assert any(i["kind"] == "tags" for i in store.taken)
    sink.finish()
    assert store.statuses() == ["FINISHED"]


def test_a_torn_spool_line_is_kept_apart(tmp_path, store):
    spool = Spool(tmp_path / "run" / "mlflow-spool.jsonl")
    spool.append([{"kind": "metrics", "step": 1, "time_ms": 1, "values": {"loss": 1.0}}])
    with open(spool.path, "a") as file:
        file.write('{"kind": "metr')
    spool.append([{"kind": "metrics", "step": 2, "time_ms": 1, "values": {"loss": 1.0}}])
    make(tmp_path).finish()
    assert store.steps() == [1, 2]
    assert "torn" in (tmp_path / "run" / "mlflow-rejected.jsonl").read_text()


def test_the_spool_of_an_ended_run_is_delivered_with_the_end_it_had(tmp_path, store):
    blocks = {"run": {"dir": str(tmp_path / "run")}, "data": {"sources": {"a": {"path": "x"}}}}
    recipe = Recipe.model_validate({**blocks, "stages": [{"name": "s", "steps": 1, "mixture": {"a": 1}}]})
    store.down = True
    first = make(tmp_path)
    first.metrics(7, {"loss": 1.0})
    assert first.finish("KILLED") == 2
    assert deliver_spool(recipe) == 2
    store.down = False
    assert deliver_spool(recipe) == 0
    assert store.steps() == [7] and store.statuses() == ["KILLED"]
    recipe.tracking.mlflow = False
    with pytest.raises(TrackingError, match="mlflow=false"):
        deliver_spool(recipe)


def test_after_the_end(tmp_path, store):
    sink = make(tmp_path)
    with pytest.raises(TrackingError, match="DONE"):
        sink.finish("DONE")
    sink.finish()
    sink.finish()
    with pytest.raises(TrackingError, match="after finish"):
        sink.metrics(1, {"loss": 1.0})


def test_the_spool_forgets_only_what_was_dealt_with(tmp_path):
    spool = Spool(tmp_path / "s.jsonl")
    spool.append([{"kind": "tags", "values": {"n": str(i)}} for i in range(5)])
    items, bad, position = spool.peek(3)
    assert len(items) == 3 and not bad
    spool.advance(position)
    spool.compact()
    assert [i["values"]["n"] for i in Spool(spool.path).peek(9)[0]] == ["3", "4"]
    spool.advance(spool.peek(9)[2])
    spool.append([{"kind": "tags", "values": {"n": "5"}}])  # another thread, between sending and shortening
    spool.compact()
    assert [i["values"]["n"] for i in spool.peek(9)[0]] == ["5"] and len(spool) == 1


# ------------------------------------------------------------------------------------------------- names and addresses


def test_uri_precedence_and_refusals(tmp_path):
    run = tmp_path / "runs" / "a"
    assert tracking_uri("http://x", run, {"MLFLOW_TRACKING_URI": "http://y"}) == "http://x"
    assert tracking_uri(None, run, {"MLFLOW_TRACKING_URI": "http://y"}) == "http://y"
    assert tracking_uri(None, run, {}) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    for folder in ("file:///x", "./mlruns", "/x/mlruns"):
        with pytest.raises(TrackingError, match="sqlite:"):
            tracking_uri(folder, run, {})


def test_files_of_a_database_stay_beside_it_and_a_server_decides_for_itself(tmp_path):
    assert artifact_location(f"sqlite:///{tmp_path}/m.db", tmp_path / "r") == f"file://{tmp_path}/mlartifacts"
    assert artifact_location("postgresql+psycopg2://u:p@h/db", tmp_path / "runs" / "r") == f"file://{tmp_path}/runs/mlartifacts"
    assert artifact_location("https://server", tmp_path) is None


def test_how_to_open_quotes_and_hides():
    assert how_to_open("sqlite:////a b/m.db", "1", "2") == "mlflow ui --backend-store-uri 'sqlite:////a b/m.db'"
    assert how_to_open("https://me:secret@host:80/base/", "1", "2") == "https://host:80/base/#/experiments/1/runs/2"
    assert "secret" not in how_to_open("postgresql://me:secret@host/db", None, None)
    assert redact("Max retries: http://me:secret@host/x and http://ok/x") == "Max retries: http://***@host/x and http://ok/x"


def test_keys_are_legal_and_never_collide():
    from mlflow.utils.validation import _validate_metric_name

    names = ["loss", "lr/vision", "a b", "näme", "n_me", "a//b", "/a", "../x", "x" * 300, "x" * 299, "50%", "a=b", "task loss (mean)"]
    keys = [store_key(n) for n in names]
    assert len(set(keys)) == len(names) and keys[:3] == names[:3]
    for key in keys:
        _validate_metric_name(key)


def test_params_name_stages_and_keep_long_values_readable():
    params = param_values(
        {"run": {"seed": 1}, "stages": [{"name": "align", "steps": 3, "mixture": {"a": 1.0}}], "tasks": ["x"], "long": "y" * 9000}
    )
    assert params["run.seed"] == "1" and params["stages.align.steps"] == "3" and params["stages.align.mixture.a"] == "1.0"
    assert params["tasks"] == '["x"]' and params["stage_order"] == '["align"]'
    assert len(params["long"]) == 6000 and "9000 characters" in params["long"]
