"""Files that a store does not take, and spools of several programs of one run: who may touch them, and that nothing is lost."""

import errno
import os
import time

import pytest
from typer.testing import CliRunner

from megavlm.cli.track import app
from megavlm.config.schema import TrackingConfig
from megavlm.testing.mlflow_server import DEAD_SERVER
from megavlm.testing.spools import spooled, write_recipe
from megavlm.tracking.file_delivery import ASIDE_RETRY_S, MAX_TRIES
from megavlm.tracking.mlflow_sink import MlflowSink
from megavlm.tracking.spool import SpoolReader
from megavlm.tracking.spool_folders import DELIVERY_LOCK, SpoolLock, TakenSpool, num_waiting, spools_of, waiting_of
from tests.unit.tracking.test_tracking_sink import Bench


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "run")


# ------------------------------------------------------------------------------------------------- files


def test_a_file_that_is_not_stored_holds_up_nothing_and_is_tried_again(bench):
    bench.store.no_files = PermissionError("not yours")
    bench.put_files("/a.png", "/good.png", "/b.png")
    bench.put(1, 2)
    assert bench.delivery.round() and bench.store.steps() == [1, 2]
    bench.delivery.files_round()
    assert bench.store.files == ["/good.png"] and bench.delivery.is_well.is_set()
    assert len(bench.warnings()) == 2, "once for what is set aside, and once more behind a file that was taken"
    assert "does not store /a.png (PermissionError: not yours)" in bench.warnings()[0]
    tries = bench.store.file_tries
    bench.put(3)
    assert bench.delivery.round() and bench.store.steps() == [1, 2, 3]
    bench.delivery.files_round()
    assert bench.store.file_tries == tries, "it was a moment ago"
    bench.now += ASIDE_RETRY_S[0] + 0.1
    bench.delivery.files_round()
    assert bench.store.file_tries == tries + 2
    bench.now += ASIDE_RETRY_S[1] - 1
    bench.put_files("/c.png")
    bench.delivery.round()
    bench.delivery.files_round()
    assert bench.store.file_tries == tries + 3, "another one does not bring the others forward"
    bench.now += 2
    bench.delivery.files_round()
    assert bench.store.file_tries == tries + 6
    bench.store.no_files = None
    bench.another().files_round()  # the next start asks at once
    assert bench.store.files == ["/good.png", "/a.png", "/b.png", "/c.png"] and num_waiting(bench.spool) == 0


def test_a_file_is_not_tried_for_ever(bench):
    bench.store.no_files = OSError("quota")
    bench.put_files("/a.png")
    bench.delivery.round()
    for _ in range(MAX_TRIES + 3):
        bench.delivery.files_round(try_now=True)
    assert bench.store.file_tries == MAX_TRIES and num_waiting(bench.spool) == 0
    assert f"not taken {MAX_TRIES} times" in bench.rejected() and "/a.png" in bench.rejected()


def test_files_that_a_dead_server_does_not_take_lose_no_try(bench):
    bench.put_files("/a.png", "/b.png")
    assert bench.delivery.round()
    bench.store.down = True
    for _ in range(2 * MAX_TRIES):
        bench.delivery.files_round(try_now=True)
    assert not bench.delivery.is_well.is_set() and bench.store.file_tries == 2 * MAX_TRIES, "one each time: there is no use in the others"
    bench.store.down = False
    bench.delivery.end()
    assert bench.store.files == ["/a.png", "/b.png"] and not bench.rejected()


def test_an_outage_puts_no_file_into_the_queue_twice(bench):
    bench.put_files("/a.png")
    bench.put(1)
    bench.store.down = True
    for _ in range(5):
        bench.delivery.round(try_now=True)
    bench.store.down = False
    bench.delivery.end()
    assert bench.store.files == ["/a.png"]


def test_a_record_without_what_its_kind_needs_is_put_aside(bench):
    bench.writer.append([{"kind": "metrics", "step": 1}, {"kind": "surprise"}, {"kind": ["artifact"]}])
    bench.put(2)
    assert bench.delivery.round() and bench.store.steps() == [2]
    assert bench.rejected().count("\n") == 3


# ------------------------------------------------------------------------------------------------- several programs, one run


def test_what_ended_programs_left_is_found_and_what_others_hold_is_left_alone(tmp_path):
    ended, running = Bench(tmp_path), Bench(tmp_path)
    for step, one in enumerate((ended, running), start=1):
        one.put(step)
    ended.writer.append([{"kind": "status", "status": "FAILED", "time_ms": 1}])
    ended.writer.close()
    ended.lock.release()
    assert (waiting_of(tmp_path).left, waiting_of(tmp_path).held) == (2, 1)
    assert TakenSpool.take(running.spool) is None
    mine = Bench(tmp_path)
    mine.put(3)
    mine.delivery = mine.another(earlier=[ended.spool, running.spool], drop=("status",))
    assert mine.delivery.round() and mine.store.steps() == [1, 3] and len(mine.store.taken) == 2
    assert spools_of(tmp_path) == [running.spool, mine.spool], "what was delivered for another is deleted"
    running.delivery.round()
    assert running.store.steps() == [2]
    running.put(4)
    running.writer.close()
    running.lock.release()  # it ended while this one runs
    assert mine.delivery.round() and mine.store.steps() == [1, 3, 4]
    assert spools_of(tmp_path) == [mine.spool]


def test_replay_leaves_a_running_program_its_records(tmp_path):
    write_recipe(tmp_path)
    running = Bench(tmp_path)
    running.put(1, 2)
    done = CliRunner().invoke(app, ["replay", str(tmp_path)])
    assert done.exit_code == 1 and "2 records are left to the programs they are of" in done.output and "nothing else waits" in done.output
    assert [i["step"] for i in spooled(tmp_path)] == [1, 2] and not (tmp_path / "mlflow_run_id").exists()


def test_replay_waits_for_the_last_words_of_a_program_that_has_ended(tmp_path):
    write_recipe(tmp_path)
    ended = Bench(tmp_path)
    ended.put(1, 2)
    ended.lock.release()
    delivers = SpoolLock.take(ended.spool / DELIVERY_LOCK)
    assert (waiting_of(tmp_path).held, waiting_of(tmp_path).ending) == (2, 2)
    start = time.monotonic()
    done = CliRunner().invoke(app, ["replay", str(tmp_path), "--uri", DEAD_SERVER, "--timeout", "4"])
    assert done.exit_code == 1 and "0 of 2 records sent" in done.output and "still run" not in done.output
    assert time.monotonic() - start > 2
    delivers.release()
    assert (waiting_of(tmp_path).left, waiting_of(tmp_path).held) == (2, 0)


def test_a_lock_whose_file_was_deleted_meanwhile_is_none(tmp_path):
    one = Bench(tmp_path)
    one.lock.release()
    first = TakenSpool.take(one.spool)
    assert first is not None and TakenSpool.take(one.spool) is None
    assert first.remove_if_done() and not (tmp_path / "mlflow-spool").exists()
    first.release()
    assert TakenSpool.take(one.spool) is None and spooled(tmp_path) == []


def test_a_lock_is_given_back_though_a_forked_child_has_its_file_open(tmp_path):
    one = Bench(tmp_path)
    childs = os.dup(one.lock._file.fileno())  # of the same open file, as after a fork
    one.lock.release()
    assert TakenSpool.take(one.spool) is not None
    os.close(childs)


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", [(SpoolReader, "keep"), (TakenSpool, "remove_if_done")])
def test_a_full_disk_ends_no_delivery_of_what_others_left(tmp_path, monkeypatch, step):
    ended, mine = Bench(tmp_path), Bench(tmp_path)
    ended.put(1)
    ended.lock.release()
    mine.put(2)
    mine.delivery = mine.another(earlier=[ended.spool])
    with monkeypatch.context() as now:
        now.setattr(*step, full)
        mine.put_files("/a.png")
        assert not mine.delivery.round() and 2 in mine.store.steps(), "what is its own goes on"
        mine.delivery.end()
        (warning,) = mine.warnings()
        assert warning.startswith("the disk holds up what other programs left") and "No space left" in warning
        assert mine.store.files == ["/a.png"]
    assert mine.delivery.round() and sorted(mine.store.steps()) == [1, 2]
    assert spools_of(tmp_path) == [mine.spool]


def test_a_full_disk_ends_no_start(tmp_path, monkeypatch):
    ended = Bench(tmp_path)
    ended.put(1)
    ended.lock.release()
    with monkeypatch.context() as now:
        now.setattr(SpoolReader, "keep", full)
        sink = MlflowSink(TrackingConfig(mlflow_uri=DEAD_SERVER), "n", tmp_path, resume_step=1)
    sink.finish(None, timeout_s=0.1)
    assert [i["step"] for i in spooled(tmp_path)] == [1]


def test_without_locks_a_spool_is_anybodys_only_when_it_is_old(tmp_path, monkeypatch):
    from megavlm.tracking import spool_folders

    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(spool_folders.fcntl, "flock", none)
    one = Bench(tmp_path)
    one.put(1)
    assert TakenSpool.take(one.spool) is None and waiting_of(tmp_path).held == 1
    monkeypatch.setattr(spool_folders, "UNLOCKED_AFTER_S", -1.0)
    assert TakenSpool.take(one.spool) is not None
