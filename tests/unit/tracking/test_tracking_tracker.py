"""The facade: files of a run, silence of the other ranks, the picture of the curves."""

import errno
import json
import logging
import math
from contextlib import nullcontext

import pytest
from PIL import Image

from megavlm.config.schema import Recipe
from megavlm.tracking import tracker as tracker_module
from megavlm.tracking.curves import MAX_POINTS, plot_curves, smooth
from megavlm.tracking.metrics import MetricsError, MetricsWriter, read_metrics
from megavlm.tracking.tracker import Tracker


@pytest.fixture(autouse=True)
def restore_logging():
    logger = logging.getLogger("megavlm")
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.level, logger.propagate = before
    logger.manager._clear_cache()


@pytest.fixture
def recipe(tmp_path):
    stages = [{"name": n, "steps": 20, "mixture": {"pages": 1}} for n in ("align", "instruct")]
    blocks = {"run": {"dir": str(tmp_path / "run")}, "data": {"sources": {"pages": {"path": "x"}}}, "stages": stages}
    return Recipe.model_validate({**blocks, "tracking": {"mlflow": False}})


def record(step, stage="align", **more):
    return {"step": step, "stage": stage, "stage_step": step, "loss": 3.0 / step, "lr": {"projector": 1e-3}, **more}


def test_files_of_a_run_and_of_its_resume(recipe, capsys):
    run_dir = Tracker(recipe).run_dir
    for first, last in ((0, 5), (3, 6)):
        with Tracker(recipe, interactive=False) as tracker:
            tracker.start(first)
            tracker.stage_begins("align", 20, first)
            for step in range(first + 1, last + 1):
                tracker.step(record(step))
            tracker.evaluation({"step": last, "loss": {"held": 1.0}})
            tracker.message("hello")
    assert [r["step"] for r in read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6]
    assert [r["step"] for r in read_metrics(run_dir, "evaluation.jsonl")] == [6]
    assert json.loads((run_dir / "environment.json").read_text())["resume_step"] == 3
    assert json.loads((run_dir / "environment-0.json").read_text())["resume_step"] == 0
    assert (run_dir / "curves.png").exists()
    out = capsys.readouterr().out
    assert "stage align: 20 steps, from step 3" in out and "hello" in out and "loss/held 1" in out


def test_other_ranks_write_nothing(recipe, capsys):
    with Tracker(recipe, rank=1, world_size=2) as tracker:
        tracker.start(0)
        tracker.stage_begins("align", 20)
        tracker.step(record(1))
        tracker.evaluation({"step": 1, "loss": 1.0})
        tracker.message("hello")
        assert tracker.picture("x", "missing.png") is None and tracker.how_to_open() is None
        tracker.artifact("missing")
    assert not tracker.run_dir.exists() and capsys.readouterr().out == ""


class FakeSink:
    def __init__(self):
        self.seen = {}

    def metrics(self, step, values):
        self.seen[step] = values

    def tags(self, values):
        pass

    def artifact(self, path, folder=""):
        assert path.exists()


def test_mlflow_gets_the_loss_of_every_step_and_all_of_it_now_and_then(recipe, monkeypatch):
    sink = FakeSink()
    monkeypatch.setattr(tracker_module, "sink_for", lambda recipe, resume_step, node: sink)
    recipe.tracking.log_every_steps = 4
    tracker = Tracker(recipe)
    tracker.start(10)
    for step in range(11, 20):
        tracker.step(record(step, grad_norm=1.0, mfu=None, source_samples={"pages": 3}))
    tracker.evaluation({"step": 19, "stage": "align", "loss": {"held": 0.5}})
    whole = {"loss", "stage_loss/align", "grad_norm", "lr/projector", "source_samples/pages", "stage_step"}
    whole |= {"goodput/share", "goodput/kept_s", "goodput/elapsed_s"}
    few = {"loss", "stage_loss/align", "grad_norm"}
    assert {step: set(values) for step, values in sink.seen.items() if step < 19} == {
        s: whole if s in (13, 17) else few for s in range(11, 19)
    }
    assert sink.seen[19] == {"evaluation/loss/held": 0.5}
    assert sink.seen[12]["loss"] == 3.0 / 12


def test_a_step_made_again_goes_to_mlflow_once_unless_it_came_out_otherwise(recipe, monkeypatch):
    for first, last, scale in ((0, 8, 1.0), (4, 6, 1.0), (3, 10, 2.0)):
        sink = FakeSink()
        monkeypatch.setattr(tracker_module, "sink_for", lambda recipe, resume_step, node, sink=sink: sink)
        tracker = Tracker(recipe)
        tracker.start(first)
        (tracker.run_dir / "mlflow_run_id").write_text("r\n")
        for step in range(first + 1, last + 1):
            loss = 3.0 / step * (scale if step > 5 else 1.0)
            tracker.step({**record(step), "loss": loss})
        tracker.evaluation({"step": last, "loss": {"held": 0.5}})
        if first == 0:
            assert set(sink.seen) == set(range(1, 9))
        elif first == 4:
            assert set(sink.seen) == {6}, "5 and 6 are there already; the evaluation at 6 is new"
        else:
            assert set(sink.seen) == {6, 7, 8, 9, 10}, "4 and 5 are as before, the others came out otherwise or are new"
        tracker._finished = True
    assert [r["step"] for r in read_metrics(tracker.run_dir)] == list(range(1, 11))


def test_a_run_that_begins_anew_sends_what_the_one_before_it_had_sent_elsewhere(recipe, monkeypatch):
    for run, first, last in (("a", 0, 6), ("b", 0, 2), ("b", 2, 6), ("b", 4, 6)):
        sink = FakeSink()
        monkeypatch.setattr(tracker_module, "sink_for", lambda recipe, resume_step, node, sink=sink: sink)
        tracker = Tracker(recipe)
        tracker.start(first)
        (tracker.run_dir / "mlflow_run_id").write_text(f"{run}\n")
        for step in range(first + 1, last + 1):
            tracker.step(record(step))
            tracker.evaluation({"step": step, "loss": {"held": 0.5}})
        assert set(sink.seen) == (set() if first == 4 else set(range(first + 1, last + 1))), (run, first)
        assert all("evaluation/loss/held" in values for values in sink.seen.values())
        tracker._finished = True
    assert [r["step"] for r in read_metrics(tracker.run_dir, "metrics.cut-1.jsonl")] == list(range(1, 7))
    assert [r["step"] for r in read_metrics(tracker.run_dir, "evaluation.cut-1.jsonl")] == list(range(1, 7))


def test_a_node_that_cannot_tell_of_its_use_trains_on_and_warns_once(recipe, monkeypatch, capsys):
    tries = []

    def fail(recipe, resume_step, node):
        tries.append(node.index)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tracker_module, "sink_for", fail)
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with Tracker(recipe, rank=2, world_size=4) as tracker:
        tracker.start(0)
        for step in (1, 2):
            tracker.step(record(step))
    assert tries == [1] and capsys.readouterr().out.count("no system metrics of node 1: [Errno 28] No space left on device") == 1


def test_going_back_cuts_the_files(recipe):
    with Tracker(recipe, interactive=False) as tracker:
        tracker.start(0)
        for step in (1, 2, 3):
            tracker.step(record(step))
        tracker.go_back(1)
        tracker.step(record(2, mfu=0.5))
    assert [(r["step"], r.get("mfu")) for r in read_metrics(tracker.run_dir)] == [(1, None), (2, 0.5)]


def test_pictures_from_a_file_an_image_and_a_figure(recipe, tmp_path):
    from matplotlib.figure import Figure

    tracker = Tracker(recipe)
    tracker.start(0)
    image = Image.new("RGB", (4, 4), "red")
    image.save(tmp_path / "a.jpg")
    kept = [tracker.picture("align/one", tmp_path / "a.jpg"), tracker.picture("two", image), tracker.picture("v1.2", Figure())]
    names = [k.relative_to(tracker.run_dir).as_posix() for k in kept]
    assert names == ["pictures/align/one.jpg", "pictures/two.png", "pictures/v1.2.png"]
    for path in kept:
        Image.open(path).verify()
    for name in ("../outside", "", "."):
        with pytest.raises(ValueError, match="name"):
            tracker.picture(name, image)
    tracker.finish()


@pytest.mark.parametrize(
    ("error", "status"), [(None, "FINISHED"), (KeyboardInterrupt, "KILLED"), (ValueError, "FAILED"), (SystemExit, "FINISHED")]
)
def test_the_end_of_the_block_is_the_end_of_the_run(recipe, monkeypatch, error, status):
    seen = []
    tracker = Tracker(recipe)
    monkeypatch.setattr(tracker, "finish", seen.append)
    with nullcontext() if error is None else pytest.raises(error), tracker:
        if error is not None:
            raise error
    assert seen == [status]


def colours(path, box):
    """Colours that cover at least 40 pixels of a part of a picture; box in fractions (left, top, right, bottom)."""
    image = Image.open(path).convert("RGB")
    w, h = image.size
    part = image.crop((int(box[0] * w), int(box[1] * h), int(box[2] * w), int(box[3] * h)))
    return {colour for count, colour in part.getcolors(1 << 24) if count >= 40}


def test_curves_colour_each_stage_and_survive_gaps(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 121):
        stage = "align" if step <= 60 else "instruct"
        losses = {"caption": 1.0 / step} | ({"reading": 2.0} if step % 3 == 0 else {})
        rates = {"projector": 1e-3} | ({"language": 1e-4} if stage == "instruct" else {})
        loss = math.nan if step == 30 else 3.0 / step
        writer.write({"step": step, "stage": stage, "loss": loss, "lr": rates, "task_loss": losses, "grad_norm": math.inf})
    writer.close()
    path = plot_curves(tmp_path)
    blue, orange = (31, 119, 180), (255, 127, 14)
    assert blue in colours(path, (0, 0, 0.45, 0.33)) and orange not in colours(path, (0, 0, 0.4, 0.33))
    assert orange in colours(path, (0.5, 0, 0.8, 0.33))


def test_a_long_run_is_drawn_from_a_part_of_its_lines(tmp_path, monkeypatch):
    from megavlm.tracking import metrics

    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {s}, "loss": 1.0}}\n' for s in range(1, 4 * MAX_POINTS)))
    decoded, decode = [], metrics.decode_line
    monkeypatch.setattr(metrics, "decode_line", lambda line: decoded.append(1) or decode(line))
    plot_curves(tmp_path)
    assert len(decoded) < 2 * MAX_POINTS


def test_nothing_to_draw_is_said(tmp_path):
    MetricsWriter(tmp_path).close()
    with pytest.raises(MetricsError, match="no step"):
        plot_curves(tmp_path)


def test_smoothing_starts_unbiased_and_steps_over_nan():
    assert smooth([2.0] * 100) == pytest.approx([2.0] * 100)
    assert smooth([math.nan])[0] != smooth([math.nan])[0]
    assert smooth([1.0, math.nan, math.inf, 1.0]) == pytest.approx([1.0] * 4)
