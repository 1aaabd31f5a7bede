"""The loader: same steps for any number of workers, bounded prefetch, errors where they belong."""

from __future__ import annotations

import json
import tarfile
import threading
import time
from itertools import pairwise

import pytest
import torch

from megavlm.data import bad_samples
from megavlm.data.bad_samples import BadDataError
from megavlm.data.index import build_index
from megavlm.data.loader import StageData
from megavlm.data.plan import StepPlanner


class Planner:
    """Counts the plans it gave; may fail at a step."""

    def __init__(self, inner, fail_at=None):
        self.inner, self.fail_at, self.count, self.threads = inner, fail_at, 0, set()

    def next(self):
        self.threads.add(threading.current_thread().name)
        if self.fail_at == self.count:
            raise RuntimeError("planner broke")
        self.count += 1
        return self.inner.next()


@pytest.fixture
def open_stage(make_recipe, tokenizer):
    opened = []

    def start(*, workers=1, prefetch=2, cursor=None, fail_at=None, dp_rank=0, dp_size=1, source=None, bad=0.01, **options):
        settings = {"num_workers": workers, "prefetch_steps": prefetch, "max_bad_fraction": bad, "image": {"decoder": "pillow"}}
        recipe = make_recipe(data=settings, source=source)
        indexes = {"a": build_index(recipe.data.sources["a"], recipe.data, recipe.model, "multimodal", tokenizer, progress=False)}
        stage = recipe.stages[0]
        inner = StepPlanner(
            indexes, stage, recipe.data, recipe.model, seed=3, dp_size=dp_size, num_microbatches=4 // dp_size, cursor=cursor
        )
        planner = Planner(inner, fail_at)
        data = StageData(recipe, stage, indexes, tokenizer, planner, dp_rank, True, **options)
        opened.append(data)
        return data, planner

    yield start
    for data in opened:
        data.close()


def digest(step):
    parts = []
    for batch in step.microbatches:
        tiles = None if batch.tiles_TCHW is None else batch.tiles_TCHW.tolist()
        parts.append(
            (batch.tokens_S.tolist(), batch.target_positions_Q.tolist(), batch.target_weights_Q.tolist(), batch.segment_samples, tiles)
        )
    return parts


def wreck_pictures(shards):
    for path in sorted(shards.glob("shard-*.tar")):
        with tarfile.open(path) as tar:
            members = [m for m in tar if m.name.endswith(".png")]
        with open(path, "r+b") as file:
            for member in members:
                file.seek(member.offset_data)
                file.write(b"\0" * member.size)


def test_number_of_workers_changes_nothing(open_stage):
    runs = []
    for workers, prefetch in ((0, 1), (1, 2), (4, 3)):
        data, _ = open_stage(workers=workers, prefetch=prefetch)
        runs.append([digest(data.next()) for _ in range(5)])
    assert runs[0] == runs[1] == runs[2]


def test_ranks_share_the_global_batch(open_stage):
    one, _ = open_stage()
    ranks = [open_stage(dp_rank=r, dp_size=2)[0] for r in range(2)]
    for _ in range(3):
        whole = sorted(str(p) for p in digest(one.next()))
        assert sorted(str(p) for r in ranks for p in digest(r.next())) == whole


def test_cursor_resumes_behind_the_last_step_handed_out(open_stage):
    data, _ = open_stage(workers=2, prefetch=3)
    assert data.cursor is None
    for _ in range(2):
        data.next()
    cursor = json.loads(json.dumps(data.cursor))
    rest = [digest(data.next()) for _ in range(3)]
    again, _ = open_stage(cursor=cursor)
    assert [digest(again.next()) for _ in range(3)] == rest


def test_restoring_costs_nothing_whatever_was_buffered(open_stage):
    data, planner = open_stage(workers=2, prefetch=16)
    for _ in range(3):
        data.next()
    end = time.monotonic() + 30
    while planner.count <= 10:
        assert time.monotonic() < end, "many steps lie ready behind the cursor"
        time.sleep(0.01)
    text = json.dumps(data.cursor)
    assert len(text) <= 10_000
    wanted = digest(data.next())
    begun = time.perf_counter()
    again, planner = open_stage(workers=1, prefetch=1, cursor=json.loads(text))
    step = again.next()
    assert time.perf_counter() - begun < 1.0
    assert planner.count <= 2, "nothing is planned or read twice to find the place"
    assert digest(step) == wanted


def test_prefetch_is_bounded_and_in_the_background(open_stage):
    data, planner = open_stage(workers=2, prefetch=3)
    step = data.next()
    time.sleep(0.3)
    assert planner.count == 4, "the step in hand and three ahead"
    assert threading.current_thread().name not in planner.threads
    assert step.plan.step == 0
    assert step.wait_s > 0
    begun = time.perf_counter()
    assert data.next().wait_s <= time.perf_counter() - begun


def test_batches_for_a_gpu_are_pinned_by_the_workers(open_stage, monkeypatch):
    threads = set()

    def pin_memory(tensor):  # there is no page-locked memory without CUDA
        threads.add(threading.current_thread().name)
        return tensor + 0

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    plain, for_gpu = open_stage(workers=1)[0], open_stage(workers=1, device="cuda")[0]
    wanted = digest(plain.next())
    assert not threads
    assert digest(for_gpu.next()) == wanted
    assert {name.rpartition("_")[0] for name in threads} == {"data"}


def test_no_worker_means_no_thread(open_stage):
    before = threading.active_count()
    data, planner = open_stage(workers=0)
    data.next()
    assert threading.active_count() == before
    assert planner.threads == {threading.current_thread().name}
    assert planner.count == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_surface_at_their_step(open_stage, workers):
    data, _ = open_stage(workers=workers, fail_at=2)
    data.next()
    data.next()
    with pytest.raises(RuntimeError, match="planner broke"):
        data.next()


def test_worker_errors_surface_at_their_step(open_stage, monkeypatch):
    data, _ = open_stage(workers=2)
    monkeypatch.setattr(data, "_materialise", lambda packs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        data.next()


def test_close_ends_the_threads_and_may_be_called_twice(open_stage):
    before = threading.active_count()
    data, _ = open_stage(workers=3)
    data.next()
    data.close()
    data.close()
    assert threading.active_count() == before


def test_bad_samples_are_logged_once_by_the_designated_rank(open_stage, shards, tmp_path):
    wreck_pictures(shards)
    logging, _ = open_stage(log_bad_samples=True, bad=1.0)
    silent, _ = open_stage(bad=1.0)
    step = logging.next()
    silent.next()
    lines = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert len(lines) == sum(b.num_bad_samples for b in step.microbatches) > 0
    assert set(lines[0]) == {"step", "dp_rank", "source", "key", "row", "reason"}
    assert {line["step"] for line in lines} == {0}, "prefetched steps are not logged before they are handed out"
    assert all(float(b.target_weights_Q[torch.isin(b.target_segments_Q, with_image(b))].sum()) == 0 for b in step.microbatches)


def test_bad_samples_are_told_at_the_first_and_at_every_doubling(open_stage, shards, monkeypatch):
    wreck_pictures(shards)
    told = []
    monkeypatch.setattr(bad_samples.log, "warning", lambda text, *values: told.append(text % values))
    data, _ = open_stage(log_bad_samples=True, bad=1.0)
    for _ in range(6):
        data.next()
    counts = [int(line.split()[0]) for line in told]
    assert 1 < len(counts) < 6 and all(after >= 2 * before for before, after in pairwise(counts))
    assert "do not count in the loss" in told[0] and "bad_samples.jsonl" in told[0]


def with_image(batch):
    return torch.tensor([i for i, task in enumerate(batch.segment_tasks) if task in ("read", "compare")])


def test_too_many_bad_samples_stop_the_run(open_stage, shards):
    wreck_pictures(shards)
    data, _ = open_stage(bad=0.01)
    with pytest.raises(BadDataError, match=r"[12]\d of \d+ samples so far could not be read, more than data.max_bad_fraction=0.01"):
        for _ in range(20):
            data.next()


def test_zero_tolerance_stops_at_the_first(open_stage, shards):
    wreck_pictures(shards)
    data, _ = open_stage(bad=0.0)
    with pytest.raises(BadDataError):
        data.next()
