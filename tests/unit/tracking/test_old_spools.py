"""Spools as version 094a294 wrote them, in mlflow-spool/ itself and mlflow-spool-node-<N>/: their records are found and delivered."""

import json

import pytest
from typer.testing import CliRunner

from megavlm.cli.track import app
from megavlm.config.schema import TrackingConfig
from megavlm.testing.mlflow_server import DEAD_SERVER
from megavlm.testing.spools import spooled, write_recipe
from megavlm.tracking.metrics import encode_line
from megavlm.tracking.mlflow_sink import MlflowSink
from megavlm.tracking.old_spools import adopt_old_spools
from megavlm.tracking.spool_folders import SpoolLock, spools_of, waiting_of
from tests.unit.tracking.test_tracking_sink import Bench, metrics

STATUS = {"kind": "status", "status": "FAILED", "time_ms": 1}


@pytest.fixture
def old(tmp_path):
    """A run's folder with five records that nobody sent, of two nodes, and one that was sent."""
    root, second = tmp_path / "mlflow-spool", tmp_path / "mlflow-spool-node-1"
    sent = encode_line(metrics(1)) + "\n"
    write(root, [metrics(1), metrics(2), STATUS])
    (root / "delivered.json").write_text(json.dumps({"file": 1, "bytes": len(sent)}))
    (root / "lock").touch()
    write(root / "system", [metrics(3)])
    write(second / "system", [metrics(4)])
    write(second, [metrics(5)])  # killed before its delivering process began: no lock
    return tmp_path


def write(folder, items):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "000001.jsonl").write_text("".join(encode_line(item) + "\n" for item in items))


def test_they_are_moved_and_delivered_before_all_others(old):
    adopt_old_spools(old)
    assert (waiting_of(old).left, waiting_of(old).held) == (5, 0)
    assert sorted(p.name for p in old.iterdir()) == ["mlflow-spool"]
    mine = Bench(old)
    mine.put(6)
    mine.delivery = mine.another(earlier=spools_of(old)[:-1], drop=("status",))
    assert mine.delivery.round() and mine.store.steps() == [2, 3, 5, 4, 6] and len(mine.store.taken) == 5
    assert spools_of(old) == [mine.spool] and not mine.rejected()
    adopt_old_spools(old)
    assert [p.parent for p in old.rglob("*.jsonl")] == [mine.spool]


def test_a_move_that_was_killed_is_ended_by_the_next(old):
    """At every file: nothing is lost, and what was sent is sent again at most."""
    adopt_old_spools(old)
    (spool,) = (folder for folder in spools_of(old) if folder.name.split("-")[1:-1] == ["old"])
    for name in ("system", "000001.jsonl"):
        (spool / name).rename(old / "mlflow-spool" / name)
        adopt_old_spools(old)
        assert {item.get("step") for item in spooled(old)} >= {None, 2, 3, 4, 5}


def test_one_whose_program_still_runs_is_left_to_it(old):
    running = SpoolLock.take(old / "mlflow-spool" / "lock")
    adopt_old_spools(old)
    assert (waiting_of(old).left, waiting_of(old).held) == (2, 3) and (old / "mlflow-spool" / "000001.jsonl").exists()
    assert not (old / "mlflow-spool-node-1").exists()
    running.release()
    adopt_old_spools(old)
    assert (waiting_of(old).left, waiting_of(old).held) == (5, 0)


def test_a_start_finds_them(old):
    config = TrackingConfig(mlflow_uri=DEAD_SERVER)
    MlflowSink(config, "n", old, resume_step=5).finish(None, timeout_s=0.1)
    assert [item["step"] for item in spooled(old)] == [2, 3, 5, 4], "the end of the earlier start was not the end"


def test_replay_counts_them(old):
    write_recipe(old)
    done = CliRunner().invoke(app, ["replay", str(old), "--uri", DEAD_SERVER, "--timeout", "1"])
    assert done.exit_code == 1 and "0 of 5 records sent" in done.output
