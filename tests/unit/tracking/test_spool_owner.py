"""Spools on a file system whose locks are not seen from another machine: only an owner that has fallen silent loses one."""

import os
import time

import pytest

from megavlm.config.schema import TrackingConfig
from megavlm.testing.mlflow_server import DEAD_SERVER
from megavlm.tracking import mlflow_sink, spool_owner
from megavlm.tracking.mlflow_sink import MlflowSink
from megavlm.tracking.spool_folders import TakenSpool, spools_of, waiting_of
from megavlm.tracking.spool_owner import SILENT_AFTER_S, Heart, Owner
from tests.unit.tracking.test_tracking_sink import Bench


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A running program on another machine: its writer's lock does not reach here."""
    with monkeypatch.context() as there:
        there.setattr(spool_owner, "this_machine", lambda: "another")
        bench = Bench(tmp_path)
    bench.put(1, 2)
    bench.lock.release()
    return bench


def silent_for(spool, seconds):
    (file,) = spool.glob("owner.*")
    os.utime(file, (time.time() - seconds,) * 2)


def test_a_live_spool_of_another_machine_is_left_alone_and_a_silent_one_is_taken_over(elsewhere, tmp_path):
    mine = Bench(tmp_path)
    mine.delivery = mine.another(earlier=[elsewhere.spool])
    for seconds in (0, SILENT_AFTER_S - 5):
        silent_for(elsewhere.spool, seconds)
        assert mine.delivery.round() and not mine.store.taken and elsewhere.spool in spools_of(tmp_path)
        assert (waiting_of(tmp_path).left, waiting_of(tmp_path).held) == (0, 2)
    silent_for(elsewhere.spool, SILENT_AFTER_S + 5)
    assert waiting_of(tmp_path).left == 2, "which looks, and takes nothing"
    assert mine.delivery.round() and mine.store.steps() == [1, 2] and spools_of(tmp_path) == [mine.spool]


def test_what_a_program_let_go_of_needs_no_silence(elsewhere):
    Owner.of(elsewhere.spool).let_go()
    taken = TakenSpool.take(elsewhere.spool)
    assert taken is not None
    taken.release()
    assert Owner.of(elsewhere.spool).has_let_go()


def test_a_dead_owner_on_this_machine_needs_no_silence_since_the_locks_tell(tmp_path):
    bench = Bench(tmp_path)
    assert TakenSpool.take(bench.spool) is None
    bench.lock.release()
    assert TakenSpool.take(bench.spool) is not None


def test_of_two_machines_that_see_the_same_silence_one_takes_the_spool(elsewhere, monkeypatch):
    silent_for(elsewhere.spool, SILENT_AFTER_S + 5)
    first, second = Owner.of(elsewhere.spool), Owner.of(elsewhere.spool)
    assert first.may_be_replaced() and second.may_be_replaced()
    assert first.replace() and not second.replace()
    monkeypatch.setattr(spool_owner, "this_machine", lambda: "a third")
    assert not Owner.of(elsewhere.spool).may_be_replaced(), "the new one is not as silent as the old one was"
    second.let_go()
    assert not Owner.of(elsewhere.spool).has_let_go(), "what is another's by now"


def test_a_heart_beats_until_it_is_told_to_stop(elsewhere, monkeypatch):
    monkeypatch.setattr(spool_owner, "BEAT_EVERY_S", 0.01)
    heart, owner = Heart(), Owner.of(elsewhere.spool)
    heart.add(owner)
    heart.start()
    silent_for(elsewhere.spool, 1000)
    wait_for(lambda: not owner.may_be_replaced())
    heart.remove(owner)
    time.sleep(0.05)
    silent_for(elsewhere.spool, 1000)
    time.sleep(0.05)
    assert owner.may_be_replaced()


def test_a_delivering_process_beats_from_its_start_and_lets_go_at_its_end(tmp_path, monkeypatch):
    make = mlflow_sink.make_spool

    def silent(run_dir, label):
        folder, held = make(run_dir, label)
        silent_for(folder, 1000)
        return folder, held

    monkeypatch.setattr(mlflow_sink, "make_spool", silent)
    sink = MlflowSink(TrackingConfig(mlflow_uri=DEAD_SERVER), "n", tmp_path)
    (spool,) = spools_of(tmp_path)
    sink.tags({"a": "b"})
    wait_for(lambda: time.time() - next(spool.glob("owner.*")).stat().st_mtime < 100)
    assert not Owner.of(spool).has_let_go()
    assert sink.finish(None, timeout_s=0.1) == 1 and Owner.of(spool).has_let_go()


def wait_for(condition):
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
