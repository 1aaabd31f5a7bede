"""What ranks tell of themselves: memory of a process, records, lines, ranks.json, curves."""

from __future__ import annotations

import json

import pytest
from matplotlib.figure import Figure
from PIL import Image

from megavlm.tracking import process_memory
from megavlm.tracking.curves import plot_curves
from megavlm.tracking.curves_of_ranks import draw_memory, draw_times, read_of_ranks
from megavlm.tracking.metrics import MetricsWriter
from megavlm.tracking.process_memory import ProcessMemory, read_status
from megavlm.tracking.ranks import RankReport, mean_times, memory_line, memory_record, size, time_line, write_ranks
from megavlm.tracking.timers import PARTS

MIB = 1 << 20


def test_the_peak_outlives_what_caused_it_until_it_is_restarted():
    memory = ProcessMemory()
    filled = bytearray(64 * MIB)
    held = memory.peak_bytes()
    del filled
    # The system counts pages by processor and adds up late: some of 1 MiB may be missing.
    assert 63 * MIB < held < 96 * MIB and memory.peak_bytes() > 63 * MIB
    assert memory.restart()
    assert memory.peak_bytes() < 32 * MIB


def test_a_system_that_restarts_no_peak_counts_from_the_earlier_one(monkeypatch, tmp_path):
    first = bytearray(64 * MIB)
    del first
    monkeypatch.setattr(process_memory, "_CLEAR", tmp_path / "missing" / "clear_refs")
    memory = ProcessMemory()
    second = bytearray(32 * MIB)
    assert memory.peak_bytes() < 8 * MIB, "below the earlier peak nothing can be seen"
    assert not memory.restart()
    third = bytearray(96 * MIB)
    assert memory.peak_bytes() > 48 * MIB
    del second, third


def test_without_proc_the_life_time_peak_stands_for_both(monkeypatch, tmp_path):
    _, peak = read_status()
    monkeypatch.setattr(process_memory, "_STATUS", tmp_path / "missing")
    now, most = read_status()
    assert now == most and most == pytest.approx(peak, rel=0.5)


def report(rank, peak, estimated=100 * MIB, **more):
    return RankReport(rank, {"data": rank, "pipeline": 0}, peak, {"parameters": estimated - 7, "head": 7}, **more)


def test_record_and_line_name_the_highest_rank():
    reports = [report(0, 90 * MIB), report(1, 3 << 30, estimated=2 << 30), report(2, 80 * MIB)]
    assert memory_record(reports) == {
        "peak_bytes": 3 << 30,
        "peak_rank": 1,
        "estimated_bytes": 2 << 30,
        "least_peak_bytes": 80 * MIB,
    }
    assert memory_line(reports) == (
        "peak memory of training 3.00 GiB on rank 1 (least: 80 MiB on rank 2), with data and Python; estimated for tensors 2.00 GiB"
    )
    gpu = [report(0, 90 * MIB, reserved_bytes=128 * MIB)]
    assert memory_record(gpu)["reserved_bytes"] == 128 * MIB
    assert memory_line(gpu) == "peak memory of training 90 MiB, 128 MiB with what the allocator keeps; estimated for tensors 100 MiB"
    assert [size(n) for n in (0, MIB, 1536 * MIB)] == ["0 MiB", "1 MiB", "1.50 GiB"]


def test_times_are_means_over_ranks_and_small_parts_are_not_told():
    times = {**dict.fromkeys(PARTS, 0.0), "language": 1.0, "language_backward": 2.0, "data": 0.001}
    reports = [report(0, 1, time_s=times), report(1, 1, time_s={**times, "language": 2.0})]
    means = mean_times(reports)
    assert means == {**times, "language": 1.5}
    assert time_line(means, 2) == "a step of 3.5 s, mean of 2 ranks: language backward 57 %, language 43 %"
    assert time_line(times, 1).startswith("a step of 3 s: ")
    assert mean_times([report(0, 1)]) == {}


def test_ranks_of_other_stages_stay(tmp_path):
    write_ranks(tmp_path, "align", [report(0, 5), report(1, 6)])
    write_ranks(tmp_path, "instruct", [report(0, 7, reserved_bytes=9, time_s={"data": 1.0})])
    path = write_ranks(tmp_path, "align", [report(0, 8)])
    found = json.loads(path.read_text())
    assert {stage: [r["peak_bytes"] for r in ranks] for stage, ranks in found.items()} == {"align": [8], "instruct": [7]}
    assert found["align"][0]["estimated_bytes"] == {"parameters": 100 * MIB - 7, "head": 7, "total": 100 * MIB}
    assert found["instruct"][0] | {"reserved_bytes": 9, "time_s": {"data": 1.0}, "data": 0} == found["instruct"][0]
    path.write_text("by hand")
    assert json.loads(write_ranks(tmp_path, "align", [report(0, 5)]).read_text())["align"][0]["peak_bytes"] == 5


def told(step, stage="align", seconds=1.0, peak=4 << 30):
    times = {**dict.fromkeys(PARTS, 0.0), "language": 0.75 * seconds, "head": 0.25 * seconds}
    memory = {"peak_bytes": peak, "peak_rank": 0, "estimated_bytes": 3 << 30, "least_peak_bytes": 2 << 30}
    return {"step": step, "stage": stage, "loss": 1.0, "memory": memory, "all_ranks_time_s": times}


def axis():
    return Figure().subplots()


def test_parts_of_a_step_are_stacked_and_outliers_cut():
    records = [told(2), told(10), told(20, seconds=50.0), told(30, "instruct", 2.0)]
    drawn = axis()
    draw_times(drawn, records, {"align": 1, "instruct": 21})
    tops = [area.get_datalim(drawn.transData) for area in drawn.collections]
    assert [(box.x0, box.x1) for box in tops] == [(0.5, 20.5)] * 2 + [(20.5, 30.5)] * 2, "stages do not run into each other"
    assert tops[0].y1 == pytest.approx(37.5) and tops[1].y1 == pytest.approx(50.0), "the head stands on the LLM"
    assert drawn.get_legend_handles_labels()[1] == ["language", "head"]
    assert drawn.get_ylim()[1] == pytest.approx(1.08 * 2.0) and "outliers cut" in drawn.get_ylabel()


def test_memory_is_drawn_beside_its_estimate():
    drawn = axis()
    draw_memory(drawn, [told(2), told(10, peak=5 << 30)], {})
    assert {line.get_label(): list(line.get_ydata()) for line in drawn.lines} == {
        "highest rank": [4.0, 5.0],
        "lowest rank": [2.0, 2.0],
        "estimate": [3.0, 3.0],
    }
    assert drawn.get_ylabel() == "peak memory, GiB"


def test_only_records_that_tell_are_read_and_long_runs_are_thinned(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in range(1, 101):
        writer.write(told(step) if step % 10 == 0 else {"step": step, "loss": 1.0})
    writer.close()
    with writer.path.open("a") as file:
        file.write('{"step": 101, "memory": {"peak')
    assert [r["step"] for r in read_of_ranks(writer.path, 100)] == list(range(10, 101, 10))
    assert [r["step"] for r in read_of_ranks(writer.path, 5)] == [10, 30, 50, 70, 90]


def test_curves_grow_by_what_ranks_tell(tmp_path):
    heights = {}
    for name, records in (("plain", [{"step": 1, "loss": 1.0}]), ("told", [told(1)])):
        writer = MetricsWriter(tmp_path / name)
        for record in records:
            writer.write(record)
        writer.close()
        heights[name] = Image.open(plot_curves(tmp_path / name)).height
    assert heights["told"] == pytest.approx(heights["plain"] + 2 * 2.6 * 110, abs=2)
