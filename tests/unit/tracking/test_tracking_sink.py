"""Delivery to a store that fails or refuses, the spool between two processes, a disk that is full: nothing lost, nothing doubled."""

import errno
import os

import pytest

from megavlm.tracking import line_file
from megavlm.tracking.delivery import RETRY_AFTER_S, Delivery
from megavlm.tracking.line_file import LineFile
from megavlm.tracking.mlflow_sink import Node, node_of
from megavlm.tracking.mlflow_store import Rejected, TrackingError, artifact_location, how_to_open, param_values, store_key, tracking_uri
from megavlm.tracking.mlflow_store import without_password as redact
from megavlm.tracking.spool import RECORDS_PER_FILE, SpoolReader, SpoolWriter
from megavlm.tracking.spool_folders import make_spool, num_waiting
from megavlm.tracking.system_metrics import SystemMetrics


class FakeStore:
    """Stands for MLflow: takes everything, unless told to fail or refuse."""

    address = "http://***@host"

    def __init__(self):
        self.run_id, self.experiment_id = None, None
        self.is_open, self.down, self.refuse = False, False, ()
        self.taken, self.tries = [], 0
        self.no_files, self.files, self.file_tries = None, [], 0

    def _answer(self):
        self.tries += 1
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

    def send_file(self, item):
        self.file_tries += 1
        if self.down:
            raise ConnectionError("refused")
        if self.no_files is not None and "good" not in item["path"]:
            raise self.no_files
        self.files.append(item["path"])

    def answers(self):
        return not self.down

    def steps(self):
        return [i["step"] for i in self.taken if i["kind"] == "metrics"]


class Bench:
    """A spool, a store and the delivery between them, by hand."""

    def __init__(self, folder):
        self.folder, self.store, self.told, self.now = folder, FakeStore(), [], 0.0
        self.spool, self.lock = make_spool(folder, "node-0")
        self.writer = SpoolWriter(self.spool)
        self.delivery = self.another()

    def another(self, **options):
        """The delivery of a process started again."""
        return Delivery(
            self.store, self.spool, self.folder, lambda what, value: self.told.append((what, value)), lambda: self.now, **options
        )

    def put(self, *steps):
        self.writer.append([metrics(s) for s in steps])

    def put_files(self, *paths):
        self.writer.append([{"kind": "artifact", "path": path, "folder": ""} for path in paths])

    def warnings(self):
        return [value for what, value in self.told if what == "warning"]

    def rejected(self):
        path = self.folder / "mlflow-rejected.jsonl"
        return path.read_text() if path.exists() else ""


def metrics(step):
    return {"kind": "metrics", "step": step, "time_ms": 1, "values": {"loss": 1.0}}


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "run")


def test_everything_arrives_in_order_over_many_files_which_are_deleted(bench):
    count = 2 * RECORDS_PER_FILE + 7
    for step in range(1, count + 1):
        bench.put(step)
        if step == RECORDS_PER_FILE + 3:
            assert bench.delivery.round()
    assert bench.delivery.round() and bench.store.steps() == list(range(1, count + 1))
    assert len(list(bench.spool.glob("*.jsonl"))) == 1, "only the file that is written to is left"
    assert num_waiting(bench.spool) == 0


def test_a_delivery_killed_anywhere_goes_on_where_it_was(bench):
    bench.put(1, 2, 3)
    bench.delivery.round()
    bench.put(4, 5)
    bench.store.down = True  # killed in the middle of sending: nothing was noted
    assert not bench.delivery.round()
    bench.store.down = False
    bench.put(6)
    bench.another().round()
    assert bench.store.steps() == [1, 2, 3, 4, 5, 6]
    bench.another().round()
    assert bench.store.steps() == [1, 2, 3, 4, 5, 6], "what was taken is noted on disk"


def test_a_writer_killed_and_started_again_continues_behind_its_torn_line(bench):
    bench.put(1)
    newest = max(bench.spool.glob("*.jsonl"))
    with open(newest, "a") as file:
        file.write('{"kind": "metr')
    SpoolReader(bench.spool).keep(lambda item: True)
    bench.writer = SpoolWriter(bench.spool)
    bench.put(2)
    bench.another().round()
    assert bench.store.steps() == [1, 2]
    assert "torn" in bench.rejected()


def test_a_dead_server_is_reported_once_asked_seldom_and_gets_all_when_it_is_back(bench):
    bench.store.down = True
    for step in range(1, 6):
        bench.put(step)
        assert not bench.delivery.round()
    assert bench.store.tries == 1 and len(bench.warnings()) == 1
    assert "does not take records" in bench.warnings()[0] and "user:pass" not in bench.warnings()[0]
    for k, pause in enumerate((*RETRY_AFTER_S, RETRY_AFTER_S[-1])):
        bench.now += pause - 0.1
        bench.delivery.round()
        assert bench.store.tries == 1 + k
        bench.now += 0.2
        bench.delivery.round()
        assert bench.store.tries == 2 + k
    assert not bench.delivery.round(try_now=True) and len(bench.warnings()) == 1
    bench.store.down = False
    bench.now += 1000
    assert bench.delivery.round() and bench.store.steps() == [1, 2, 3, 4, 5]
    assert ("info", "MLflow at http://***@host answers again") in bench.told


def test_refused_records_are_put_aside_and_the_others_taken(bench):
    bench.store.refuse = (3,)
    bench.put(1, 2, 3, 4, 5)
    assert bench.delivery.round() and bench.store.steps() == [1, 2, 4, 5]
    rejected = bench.rejected()
    assert rejected.count("\n") == 1 and "steps [3]" in rejected and '\\"step\\": 3' in rejected


def test_the_spool_keeps_what_is_wanted_of_what_waits(bench):
    bench.put(1, 2)
    bench.delivery.round()
    bench.writer.append([metrics(3), {"kind": "status", "status": "FAILED", "time_ms": 1}, {"kind": "tags", "values": {"a": "b"}}])
    reader = SpoolReader(bench.spool)
    assert len(reader) == 3
    reader.keep(lambda item: item["kind"] != "status")
    assert [i["kind"] for i in SpoolReader(bench.spool).peek(9)[0]] == ["metrics", "tags"]


def test_a_torn_line_behind_a_dropped_record_is_ended_too(bench):
    bench.writer.append([metrics(1), {"kind": "status", "status": "FAILED", "time_ms": 1}])
    with open(max(bench.spool.glob("*.jsonl")), "a") as file:
        file.write('{"kind": "metr')
    SpoolReader(bench.spool).keep(lambda item: item["kind"] != "status")
    assert bench.another().round() and bench.store.steps() == [1]
    assert "torn" in bench.rejected() and num_waiting(bench.spool) == 0


def test_a_full_disk_keeps_lines_in_memory_and_then_writes_them_in_order(tmp_path, monkeypatch):
    file, full, write = LineFile(tmp_path / "a.jsonl"), [False], os.write

    def half(descriptor, data):
        if full[0]:
            write(descriptor, data[:2])  # the disk takes some bytes of the line before it is full
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    file.append(["one"])
    monkeypatch.setattr(line_file.os, "write", half)
    full[0] = True
    file.append(["two"])
    file.append(["three"])
    assert (tmp_path / "a.jsonl").read_text() == "one\n" and file.num_waiting == 2
    full[0] = False
    file.append(["four"])
    file.close()
    assert (tmp_path / "a.jsonl").read_text() == "one\ntwo\nthree\nfour\n" and file.num_dropped == 0


def test_a_disk_full_for_ever_does_not_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(line_file, "MAX_WAITING_LINES", 5)
    file, write = LineFile(tmp_path / "a.jsonl"), os.write
    monkeypatch.setattr(line_file.os, "write", lambda *a: (_ for _ in ()).throw(OSError(errno.EDQUOT, "quota")))
    file.append([str(i) for i in range(8)])
    assert (file.num_waiting, file.num_dropped) == (5, 3)
    monkeypatch.setattr(line_file.os, "write", write)
    file.append(["8"])
    assert (tmp_path / "a.jsonl").read_text().split() == ["3", "4", "5", "6", "7", "8"]


def test_nodes_are_told_by_their_first_ranks():
    ranks = [{"LOCAL_RANK": str(r % 4), "LOCAL_WORLD_SIZE": "4"} for r in range(8)]
    assert [node_of(r, 8, e) for r, e in enumerate(ranks)] == [Node(0, 2), None, None, None, Node(1, 2), None, None, None]
    assert node_of(0, 1, {}) == Node(0, 1) and node_of(1, 2, {}) is None


def test_system_metrics_have_the_names_of_mlflows_own(monkeypatch, tmp_path):
    own = pytest.importorskip("mlflow.system_metrics.system_metrics_monitor")
    sampler = SystemMetrics.start(5.0, "node-1", many_nodes=True)
    (item,) = sampler.due(now_s=1000.0)
    assert sampler.due(now_s=1004.9) == [] and [i["step"] for i in sampler.due(now_s=1005.0)] == [201]
    monitor = own.SystemMetricsMonitor("r", node_id="node-1", tracking_uri=f"sqlite:///{tmp_path}/x.db")
    monitor.collect_metrics()
    seen = []
    monkeypatch.setattr(monitor.mlflow_logger, "record_metrics", lambda values, step: seen.append(values))
    monitor.publish_metrics(monitor.aggregate_metrics())
    assert set(item["values"]) == set(seen[0]) and "system/node-1/cpu_utilization_percentage" in seen[0]
    assert 0 < item["values"]["system/node-1/system_memory_usage_percentage"] <= 100
    assert "system/cpu_utilization_percentage" in SystemMetrics.start(5.0, "node-0", many_nodes=False).due(1.0)[0]["values"]
    assert SystemMetrics.start(None, "node-0", many_nodes=False) is None


def test_a_monitor_that_fails_leaves_the_others_and_is_told_of_once(caplog):
    class Good:
        def __init__(self, power_limit=1):
            self.power_limit, self.taken = power_limit, []

        def collect_metrics(self):
            self.taken.append(1 / self.power_limit)

        def aggregate_metrics(self):
            return {"use": self.taken[-1]}

        def clear_metrics(self):
            self.taken.clear()

    class Broken(Good):
        pass

    sampler = SystemMetrics([Broken(power_limit=0), Good()], 5.0, "system/")
    assert [sampler.due(now)[0]["values"] for now in (10.0, 20.0)] == [{"system/use": 1.0}] * 2
    assert SystemMetrics([Broken(power_limit=0)], 5.0, "system/").due(10.0) == []
    assert [r.getMessage() for r in caplog.records] == ["system metrics lack those of Broken (ZeroDivisionError: division by zero)"] * 2


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


def test_a_password_in_the_uri_reaches_no_param():
    params = param_values({"tracking": {"mlflow_uri": "https://me:hunter2@mlflow.example/x", "experiment": "e"}, "stages": []})
    assert params["tracking.mlflow_uri"] == "https://***@mlflow.example/x" and "hunter2" not in str(params)
