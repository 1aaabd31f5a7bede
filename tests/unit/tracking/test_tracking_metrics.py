"""metrics.jsonl: strict JSON, one line a step, nothing doubled after a resume."""

import json
import math

import numpy
import pytest
import torch

from megavlm.tracking.metrics import MetricsError, MetricsWriter, cut_after, flatten, read_cut, read_metrics, to_plain


def refuse(word):
    raise AssertionError(f"bare {word} is not JSON")


def write_steps(run_dir, steps, resume_step=0):
    writer = MetricsWriter(run_dir, resume_step)
    for step in steps:
        writer.write({"step": step, "loss": 1.0 / step})
    writer.close()
    return writer


def test_lines_are_strict_json_and_numbers_that_are_not_finite_come_back(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write({"step": 1, "loss": math.nan, "lr": {"vision": math.inf, "language": -math.inf}, "list": [math.nan, {"a": math.inf}]})
    line = (tmp_path / "metrics.jsonl").read_text()  # before close: a killed run keeps its lines
    raw = json.loads(line, parse_constant=refuse)
    assert raw["loss"] == "NaN" and raw["lr"] == {"vision": "Infinity", "language": "-Infinity"}
    writer.close()
    (record,) = read_metrics(tmp_path)
    assert math.isnan(record["loss"]) and record["lr"] == {"vision": math.inf, "language": -math.inf}
    assert math.isnan(record["list"][0]) and record["list"][1] == {"a": math.inf}


def test_resume_cuts_later_steps_and_keeps_them_aside(tmp_path):
    write_steps(tmp_path, range(1, 11))
    second = write_steps(tmp_path, range(7, 13), resume_step=6)
    assert second.num_cut_lines == 4
    assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, 13))
    assert [r["step"] for r in read_metrics(tmp_path, "metrics.cut.jsonl")] == [7, 8, 9, 10]


def test_a_line_torn_by_a_crash_is_left_out_and_cut(tmp_path):
    write_steps(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2]
    write_steps(tmp_path, [3], resume_step=2)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3]


def test_damage_inside_the_file_names_the_line(tmp_path):
    write_steps(tmp_path, [1, 2, 3])
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "rubbish", lines[2]]) + "\n")
    with pytest.raises(MetricsError, match="line 2"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("steps", [[3, 3], [3, 2]])
def test_a_step_is_written_once(tmp_path, steps):
    with pytest.raises(MetricsError, match=f"step {steps[1]} was written"):
        write_steps(tmp_path, steps)


def test_a_resumed_writer_knows_the_last_step(tmp_path):
    write_steps(tmp_path, [1, 2])
    with pytest.raises(MetricsError, match="already holds step 2"):
        write_steps(tmp_path, [2], resume_step=2)


@pytest.mark.parametrize("step", [None, 1.5, True, "1"])
def test_a_record_needs_a_step(tmp_path, step):
    with pytest.raises(MetricsError, match="step="):
        MetricsWriter(tmp_path).write({"step": step})


def test_scalars_of_other_libraries_are_taken_and_tensors_refused():
    assert to_plain({"a": torch.tensor(2), "b": numpy.float32(0.5), "c": numpy.float64(0.25), "d": numpy.int64(3), "e": torch.ones(1)}) == {
        "a": 2,
        "b": 0.5,
        "c": 0.25,
        "d": 3,
        "e": 1.0,
    }
    with pytest.raises(MetricsError, match="record/lr/vision is a tensor of 4 elements"):
        to_plain({"lr": {"vision": torch.ones(2, 2)}})
    with pytest.raises(MetricsError, match=r"record/x\[1\] is a set"):
        to_plain({"x": [1, set()]})


def test_flatten_joins_keys():
    assert flatten({"a": 1, "lr": {"vision": 2, "x": {"y": 3}}, "empty": {}}) == {"a": 1, "lr/vision": 2, "lr/x/y": 3}


def test_reading_every_third_line_keeps_the_last(tmp_path):
    write_steps(tmp_path, range(1, 12))
    assert [r["step"] for r in read_metrics(tmp_path, every=3)] == [1, 4, 7, 10, 11]


def test_a_folder_without_a_run_is_said_so(tmp_path):
    with pytest.raises(MetricsError, match="does not exist"):
        read_metrics(tmp_path)


def test_what_a_crash_tore_stops_no_later_start(tmp_path):
    """Neither what is kept nor what is set aside holds half a line."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    assert cut_after(path, 1) == (2, 1)
    assert list(read_cut(path, 0)) == [2]
    assert cut_after(path, 1) == (0, 1)
    assert [r["step"] for r in read_metrics(tmp_path)] == [1]
