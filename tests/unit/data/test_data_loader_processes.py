"""Worker processes: the same batches as threads, and no death that hangs a run or outlives it. The kills are real.

Every worker is a Python of its own that imports torch, some two seconds of a core: hence the marks.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megavlm.data.bad_samples import BadDataError
from megavlm.data.batch_memory import read_batch, write_batch
from megavlm.data.index import build_index
from megavlm.data.loader import StageData
from megavlm.data.materialise import Materialiser
from megavlm.data.plan import StepPlanner
from megavlm.data.workers import MAX_ATTEMPTS, WorkerError, WorkerPool, WorkerSetup


@pytest.fixture
def open_stage(make_recipe, tokenizer):
    opened = []

    def start(*, kind="processes", workers=2, prefetch=2, **data):
        recipe = make_recipe(data={"num_workers": workers, "workers": kind, "prefetch_steps": prefetch, **data})
        indexes = {"a": build_index(recipe.data.sources["a"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False)}
        stage = recipe.stages[0]
        planner = StepPlanner(indexes, stage, recipe.data, recipe.model, seed=3, dp_size=1, num_microbatches=4)
        opened.append(StageData(recipe, stage, indexes, tokenizer, planner, 0, True))
        return opened[-1]

    yield start
    for data in opened:
        data.close()


def state(step):
    """Everything of a step's batches that can be compared."""
    return [{k: v.tolist() if hasattr(v, "tolist") else v for k, v in vars(batch).items()} for batch in step.microbatches]


def is_alive(process_id):
    """Zombies do not count: nobody reaps in a container without init."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_gone(process_ids, limit_s=10.0):
    end = time.monotonic() + limit_s
    while any(map(is_alive, process_ids)) and time.monotonic() < end:
        time.sleep(0.02)
    return [p for p in process_ids if is_alive(p)]


def test_processes_threads_and_neither_give_the_same_batches(open_stage):
    runs = []
    for kind, workers in (("processes", 2), ("threads", 2), ("processes", 0)):
        data = open_stage(kind=kind, workers=workers)
        runs.append([state(data.next()) for _ in range(4)])
        assert len(data.worker_process_ids) == (2 if kind == "processes" and workers else 0)
    assert runs[0] == runs[1] == runs[2]
    assert any(batch["tiles_TCHW"] for step in runs[0] for batch in step)


def test_a_killed_worker_is_replaced_and_its_work_done_again(open_stage, caplog):
    whole = open_stage(workers=0)
    data = open_stage(workers=1, prefetch=3)
    for step in range(5):
        if step == 1:
            victims = data.worker_process_ids
            for process_id in victims:
                os.kill(process_id, signal.SIGKILL)
            assert not wait_until_gone(victims)
        assert state(data.next()) == state(whole.next())
    assert data.num_worker_restarts == 1
    assert "was killed by SIGKILL (out of memory?); a new one does its work again" in caplog.text


@pytest.mark.slow
def test_a_worker_killed_over_its_work_is_replaced(open_stage):
    """Killed again and again at odd moments: starting, waiting, at work."""
    whole, data = open_stage(workers=0), open_stage(workers=1, prefetch=1)
    for delay_s in (0.0, 0.01, 0.1):
        for process_id in data.worker_process_ids:
            os.kill(process_id, signal.SIGKILL)
        assert state(data.next()) == state(whole.next())
        time.sleep(delay_s)


CRASH = """
import os, signal
from megavlm.data import materialise, decode
real = materialise.make_decoder
class Crashing(decode.PillowDecoder):
    def decode(self, data):
        if data == open({poison!r}, "rb").read():
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().decode(data)
materialise.make_decoder = lambda *a: Crashing()
"""


def test_a_sample_that_kills_every_worker_is_named(open_stage, tmp_path, monkeypatch, make_recipe, tokenizer, capfd):
    """A decoder that crashes on one picture: put into the workers through sitecustomize, as a broken library would be."""
    data = open_stage(workers=1)
    index = data._pool._setup.indexes["a"]
    poison = tmp_path / "poison.png"
    poison.write_bytes(index.image(1, 0))
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(CRASH.format(poison=str(poison)))
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(BadDataError, match=rf"{MAX_ATTEMPTS} data workers died over the same packs; the last was killed by SIGSEGV .*s001"):
        for _ in range(30):
            data.next()
    assert data.num_worker_restarts == MAX_ATTEMPTS
    assert "Segmentation fault" in capfd.readouterr().err


def test_workers_that_cannot_start_are_an_error(open_stage, tmp_path, monkeypatch, capfd):
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import os; os._exit(7)")
    monkeypatch.syspath_prepend(str(site))
    with pytest.raises(WorkerError, match=r"3 data worker processes ended before they were ready; the last ended with exit code 7"):
        open_stage().next()


@pytest.mark.slow
def test_errors_of_a_worker_come_with_its_traceback(open_stage, shards):
    data = open_stage(workers=1)
    path = shards / "shard-00000.tar"
    path.write_bytes(path.read_bytes().replace(b"What number", b"What,number"))
    with pytest.raises(ValueError, match=r"the shards changed since|changed") as caught:
        for _ in range(30):
            data.next()
    assert "in data worker process" in "".join(caught.value.__notes__)
    assert len(data.worker_process_ids) == 1, "an error is no death"


@pytest.mark.slow
def test_a_tokenizer_that_changed_is_refused(open_stage, make_recipe, tokenizer):
    recipe = make_recipe()
    pool = WorkerPool(WorkerSetup(recipe, recipe.stages[0], {}, "another", True, True))
    with pytest.raises(WorkerError, match=r"tiny.model changed while the run was going on"):
        pool([])
    assert pool.process_ids == []
    pool.close()


@pytest.mark.slow
def test_close_ends_workers_in_the_middle_of_their_work(open_stage):
    data = open_stage(workers=2, prefetch=4)
    data.next()
    ids = data.worker_process_ids
    assert len(ids) == 2
    begun = time.perf_counter()
    data.close()
    data.close()
    assert not [i for i in ids if is_alive(i)]
    assert time.perf_counter() - begun < 5


def test_shared_memory_is_freed_with_the_batch(make_recipe, tokenizer):
    recipe = make_recipe()
    indexes = {"a": build_index(recipe.data.sources["a"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False)}
    planner = StepPlanner(indexes, recipe.stages[0], recipe.data, recipe.model, seed=3, dp_size=1, num_microbatches=4)
    materialise = Materialiser(recipe, recipe.stages[0], indexes, tokenizer, needs_tiles=True)
    batch = materialise(planner.next().assignment[0][0])

    def mapped():
        return Path("/proc/self/maps").read_text().count("megavlm-batch")

    def num_open_files():
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    before, files = mapped(), num_open_files()
    copies = [read_batch(*write_batch(batch)) for _ in range(5)]
    assert mapped() == before + 5
    assert num_open_files() <= files + 5, "the descriptor is closed, the mapping holds the memory"
    copies[0].tiles_TCHW.zero_()
    assert batch.tiles_TCHW.any(), "a copy is nobody else's"
    kept = copies[1].tokens_S
    del copies
    assert mapped() == before + 1, "one tensor keeps its batch's memory"
    del kept
    assert mapped() == before


RUN = """
import faulthandler, sys, time
from megavlm.config.schema import Recipe
from megavlm.data.index import build_index
from megavlm.data.loader import StageData
from megavlm.data.plan import StepPlanner
from megavlm.data.tokenizer import load_tokenizer

if __name__ == "__main__":
    recipe = Recipe.model_validate_json(open(sys.argv[1]).read())
    tokenizer, stage = load_tokenizer(recipe.data.tokenizer), recipe.stages[0]
    indexes = {"a": build_index(recipe.data.sources["a"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False)}
    planner = StepPlanner(indexes, stage, recipe.data, recipe.model, seed=3, dp_size=1, num_microbatches=4)
    with StageData(recipe, stage, indexes, tokenizer, planner, 0, True) as data:
        data.next()
        print(*data.worker_process_ids, flush=True)
        faulthandler.dump_traceback_later(18, exit=True)  # where it hangs, if it does: before the test gives it up
        while True:
            data.next()
            time.sleep(0.01)
"""


@pytest.fixture
def running(make_recipe, tmp_path):
    """A run of its own in a process group of its own, and its workers' ids."""
    recipe = make_recipe(data={"num_workers": 2, "workers": "processes"})
    (tmp_path / "recipe.json").write_text(recipe.model_dump_json())
    (tmp_path / "run.py").write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen(
        [sys.executable, tmp_path / "run.py", tmp_path / "recipe.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )
    workers = [int(i) for i in process.stdout.readline().split()]
    assert len(workers) == 2, process.communicate()
    yield process, workers
    process.kill()
    process.communicate()
    for worker in workers:
        with contextlib.suppress(OSError):
            os.kill(worker, signal.SIGKILL)


@pytest.mark.slow
def test_no_worker_outlives_a_killed_run(running):
    process, workers = running
    assert all(map(is_alive, workers))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert wait_until_gone(workers, limit_s=5) == []


@pytest.mark.slow
def test_interrupt_ends_the_run_alone_and_quietly(running):
    process, workers = running
    for each in (process.pid, *workers):  # what a scheduler does; a terminal spares the workers
        os.kill(each, signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert wait_until_gone(workers, limit_s=5) == []
    assert errors.rstrip().endswith("KeyboardInterrupt"), errors
    assert errors.count("Traceback") == 1, errors
