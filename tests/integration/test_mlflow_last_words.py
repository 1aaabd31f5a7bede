"""A delivering process that is still at work for an ended training when the next one has started: a real sqlite store, read back."""

import pytest

from megavlm.tracking.mlflow_store import MlflowStore
from megavlm.tracking.run_start import Start, forget_run_id, save_run_id, saved_run_id
from tests.integration.test_mlflow_stores import client_of, history

pytest.importorskip("mlflow")


def status(value: str) -> list[dict]:
    return [{"kind": "status", "status": value, "time_ms": 1}]


def test_an_ended_start_neither_names_the_run_of_the_next_nor_ends_it(tmp_path):
    uri, run_dir = f"sqlite:///{tmp_path}/mlflow.db", tmp_path / "run"
    run_dir.mkdir()

    def store(start: Start | None) -> MlflowStore:
        return MlflowStore(uri, "tests", "n", run_dir, None, {}, print, True, start)

    first = store(Start.begin(run_dir, anew=True))
    second = store(Start.begin(run_dir, anew=True))  # before the first one's store was even open
    forget_run_id(run_dir)
    first.open()
    assert saved_run_id(run_dir) is None
    second.open()
    assert saved_run_id(run_dir) == second.run_id != first.run_id
    first.send([{"kind": "metrics", "step": 1, "time_ms": 1, "values": {"loss": 2.0}}, *status("FINISHED")])
    client = client_of(uri)
    assert history(client, first.run_id, "loss") == [(1, 2.0)] and not history(client, second.run_id, "loss")
    assert client.get_run(first.run_id).info.status == "FINISHED" and client.get_run(second.run_id).info.status == "RUNNING"

    late = store(second._start)
    third = store(Start.begin(run_dir, anew=False))  # goes on with the second one's run
    third.open()
    assert third.run_id == second.run_id
    second.send(status("KILLED"))
    assert client.get_run(third.run_id).info.status == "RUNNING"
    third.send(status("FINISHED"))
    late.open()
    assert late.run_id == third.run_id and client.get_run(third.run_id).info.status == "FINISHED"


def test_a_disk_that_keeps_no_start_leaves_every_process_its_say(tmp_path):
    (tmp_path / "mlflow_start.json.new").mkdir()  # so that the file cannot be written
    assert Start.begin(tmp_path, anew=True) is None
    start = Start("a", "b")
    assert start.has_the_folder(tmp_path) and not start.has_successor(tmp_path)
    (tmp_path / "mlflow_start.json").write_text('["torn')
    assert start.has_the_folder(tmp_path) and not start.has_successor(tmp_path)
    save_run_id(tmp_path, "r")
    assert saved_run_id(tmp_path) == "r"
