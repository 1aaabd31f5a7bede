"""How deliveries to MLflow end, and what a disk that is full for a moment, or a machine without another process, does to them."""

import errno
import json
import os
import shutil
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException, get_error_code

from megavlm.config.schema import TrackingConfig
from megavlm.testing.mlflow_server import DEAD_SERVER
from megavlm.tracking import delivery, line_file, mlflow_sink, orders, spool, spool_folders
from megavlm.tracking.mlflow_sink import MlflowSink, Node
from megavlm.tracking.orders import Orders
from megavlm.tracking.spool import SpoolReader
from megavlm.tracking.spool_folders import DELIVERY_LOCK, SpoolLock, TakenSpool, num_waiting, spools_of
from megavlm.tracking.spool_owner import Owner
from tests.unit.tracking.test_tracking_sink import Bench


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "run")


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


# ------------------------------------------------------------------------------------------------- a full disk


def test_files_that_a_full_disk_does_not_queue_wait_where_they_were(bench, monkeypatch):
    bench.put(1)
    bench.put_files("/a.png", "/b.png")
    with monkeypatch.context() as now:
        now.setattr(line_file.os, "write", full)
        assert not bench.delivery.round()
        (warning,) = bench.warnings()
        assert warning.startswith("the disk holds up records for MLflow") and "No space left" in warning
    bench.delivery = bench.another()  # killed before the disk had room again
    assert num_waiting(bench.spool) == 3
    assert bench.delivery.round()
    bench.delivery.files_round()
    assert bench.store.files == ["/a.png", "/b.png"] and num_waiting(bench.spool) == 0


def test_a_file_that_cannot_be_set_aside_for_the_disk_is_tried_again(bench, monkeypatch):
    bench.put_files("/a.png")
    assert bench.delivery.round()
    bench.store.no_files = PermissionError("not yours")
    with monkeypatch.context() as now:
        now.setattr(line_file.os, "write", full)
        assert not bench.delivery.files_round()
    assert num_waiting(bench.spool) == 1
    bench.store.no_files = None
    bench.another().files_round()
    assert bench.store.files == ["/a.png"] and num_waiting(bench.spool) == 0


def test_how_far_a_reader_got_is_noted_when_the_disk_takes_it_and_nothing_is_doubled_meanwhile(bench, monkeypatch):
    bench.put(1)
    bench.put_files("/a.png")
    with monkeypatch.context() as now:
        now.setattr(spool.os, "replace", full)
        assert not bench.delivery.round() and not bench.delivery.round(try_now=True)
        assert not bench.delivery.files_round() and not bench.delivery.files_round()
        assert bench.store.files == ["/a.png"] and num_waiting(bench.spool) == 3
    assert bench.delivery.round(try_now=True) and bench.delivery.files_round()
    assert ("info", "the disk takes records again") in bench.told
    assert bench.store.steps() == [1] and bench.store.files == ["/a.png"] and num_waiting(bench.spool) == 0
    assert len(SpoolReader(bench.spool)) == 0


# ------------------------------------------------------------------------------------------------- the last rounds


def at_pauses(monkeypatch, bench, steps):
    """Pauses between last rounds take no time; with the n-th one `steps[n]` happens."""
    pauses = []

    def pause(seconds):
        bench.now += seconds
        pauses.append(seconds)
        steps.get(len(pauses), lambda: None)()

    monkeypatch.setattr(delivery.time, "sleep", pause)
    return pauses


def test_one_who_insists_asks_a_silent_store_until_it_answers_or_the_time_is_up(bench, monkeypatch):
    bench.put(1)
    bench.store.down = True
    pauses = at_pauses(monkeypatch, bench, {9: lambda: setattr(bench.store, "down", False)})
    bench.delivery.end()
    assert bench.store.tries == 1 and not pauses, "training's own end asks once"
    bench.delivery.end(insists_until=10.0)
    assert len(pauses) == 4 and bench.now == 8.0 and not bench.store.taken
    bench.delivery.end(insists_until=100.0)
    assert len(pauses) == 9 and bench.store.steps() == [1]


@pytest.mark.parametrize(("status", "asks_again"), [(401, False), (403, False), (500, True)])
def test_one_who_insists_takes_no_for_an_answer(bench, monkeypatch, status, asks_again):
    def refuse():
        raise MlflowException("no", error_code=get_error_code(status))

    bench.put(1)
    monkeypatch.setattr(bench.store, "open", refuse)
    pauses = at_pauses(monkeypatch, bench, {})
    bench.delivery.end(insists_until=100.0)
    assert bool(pauses) is asks_again and not bench.store.taken


def test_one_who_insists_waits_for_last_words_and_for_no_program_that_runs(tmp_path, monkeypatch):
    ended, running, mine = Bench(tmp_path), Bench(tmp_path), Bench(tmp_path)
    for step, one in enumerate((ended, running), start=1):
        one.put(step)
    ended.lock.release()
    held = SpoolLock.take(ended.spool / DELIVERY_LOCK)
    mine.delivery = mine.another(earlier=[ended.spool, running.spool])
    pauses = at_pauses(monkeypatch, mine, {3: held.release})
    mine.delivery.end(insists_until=100.0)
    assert len(pauses) == 3 and mine.store.steps() == [1] and running.spool in spools_of(tmp_path)


def test_files_that_are_set_aside_lose_no_try_to_one_who_insists(tmp_path, monkeypatch):
    ended, mine = Bench(tmp_path), Bench(tmp_path)
    ended.lock.release()
    held = SpoolLock.take(ended.spool / DELIVERY_LOCK)
    mine.put_files("/a.png")
    mine.store.no_files = OSError("quota")
    mine.delivery = mine.another(earlier=[ended.spool])
    at_pauses(monkeypatch, mine, {9: held.release})
    mine.delivery.end(insists_until=100.0)
    assert mine.store.file_tries == 1 and num_waiting(mine.spool) == 1


def test_what_was_taken_over_and_not_delivered_is_let_go(tmp_path):
    ended, mine = Bench(tmp_path), Bench(tmp_path)
    ended.put(1)
    ended.lock.release()
    mine.store.down = True
    mine.delivery = mine.another(earlier=[ended.spool])
    mine.delivery.round()
    assert not Owner.of(ended.spool).has_let_go()
    mine.delivery.close()
    assert Owner.of(ended.spool).has_let_go(), "so that another machine need not wait for its silence"
    mine.delivery.end()


@pytest.mark.slow
def test_a_process_whose_time_is_up_lets_go_of_what_it_has_taken_over(tmp_path, monkeypatch):
    """The store accepts and never answers."""
    ended = Bench(tmp_path)
    ended.put(1)
    ended.lock.release()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(50)
        config = TrackingConfig(mlflow_uri=f"http://127.0.0.1:{listener.getsockname()[1]}", system_metrics_every_s=None)
        (dead,) = ended.spool.glob("owner.*")
        sink = MlflowSink(config, "n", tmp_path)
        wait_for(lambda: not dead.exists())
        assert sink.finish(None) == 0
    assert Owner.of(ended.spool).has_let_go()


@pytest.mark.parametrize("leaves", [False, True])
def test_a_program_that_dies_behind_its_order_is_outlived_by_a_moment(monkeypatch, leaves):
    exits, farewells, gone = [], [], threading.Event()
    monkeypatch.setattr(orders, "AFTER_DEATH_S", 0.05)
    monkeypatch.setattr(orders, "_leave", lambda: None)
    monkeypatch.setattr(orders.os, "_exit", lambda code: (exits.append(code), gone.set()))
    read, write = os.pipe()
    heard = Orders(read, os.getppid())
    heard.farewell = lambda: farewells.append(1)
    timers = []

    class Timer(threading.Timer):
        def __init__(self, *given):
            super().__init__(*given)
            timers.append(self)

    monkeypatch.setattr(orders.threading, "Timer", Timer)
    heard.listen()
    os.write(write, (json.dumps({"seconds": 600.0, "leaves": leaves, "insists": True}) + "\n").encode())
    assert heard.ended.wait(10) and heard.insists_until > time.monotonic() + 500
    assert not gone.wait(0.3), "while the program lives there is the time that it gave"
    os.close(write)
    assert gone.wait(0.5 if leaves else 10) is not leaves
    assert (exits, farewells) == (([], []) if leaves else ([3], [1]))
    assert timers
    for timer in timers:
        timer.cancel()  # behind the test nothing keeps it from ending the process
    if not leaves:
        os.close(read)


# ------------------------------------------------------------------------------------------------- folders and processes


def test_nothing_of_a_spool_stays_where_open_files_outlive_their_names(tmp_path, monkeypatch):
    """NFS renames a deleted file that somebody here has open, and does not delete its folder."""
    rmtree = shutil.rmtree

    def of_nfs(folder, ignore_errors):
        opened = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
        if not any(path.is_relative_to(folder) for path in opened):
            rmtree(folder, ignore_errors)

    monkeypatch.setattr(spool_folders.shutil, "rmtree", of_nfs)
    ended, mine = Bench(tmp_path), Bench(tmp_path)
    ended.put_files("/a.png")
    ended.writer.close()
    ended.lock.release()
    mine.delivery = mine.another(earlier=[ended.spool])
    assert mine.delivery.round() and mine.delivery.files_round() and mine.delivery.round()
    assert mine.store.files == ["/a.png"] and spools_of(tmp_path) == [mine.spool]
    mine.lock.release()
    left = TakenSpool.take(mine.spool)
    assert left.remove_if_done() and mine.spool.exists()
    left.release()
    assert not (tmp_path / "mlflow-spool").exists()


def test_only_the_first_node_opens_an_ended_run_again(tmp_path):
    config = TrackingConfig(mlflow_uri=DEAD_SERVER, system_metrics_every_s=None)
    reopens = []
    for resume_step, node in ((1, Node(0, 2)), (1, Node(1, 2)), (None, None)):
        sink = MlflowSink(config, "n", tmp_path, resume_step=resume_step, node=node)
        reopens.append(sink._settings["reopen"])
        sink.finish(None, timeout_s=0.1)
    assert reopens == [True, False, False]


def test_a_delivering_process_is_started_again_when_the_machine_has_one_to_give(tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_sink, "RESTART_AFTER_S", 0.05)
    sink = MlflowSink(TrackingConfig(mlflow_uri=DEAD_SERVER), "n", tmp_path)
    start, refused = sink._start, []

    def none():
        if len(refused) < 3:
            refused.append(1)
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        return start()

    monkeypatch.setattr(sink, "_start", none)
    first = sink.process_id
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: sink.process_id != first)
    assert len(refused) == 3
    sink.finish(None, timeout_s=0.1)


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
