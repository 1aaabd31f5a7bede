"""Effective training time over restarts, by the same count for the run itself and for those who look at it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from megavlm.tracking import goodput
from megavlm.tracking.goodput import GoodputMeter, measure


def write_steps(run_dir: Path, *records: dict[str, Any]) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_steps_that_were_skipped_or_made_again_count_for_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path, *({"step": n, "step_time_s": 2.0} for n in (1, 2, 3)), {"step": 4, "step_time_s": 50.0, "skipped": "nonfinite"})
    write_steps(tmp_path, {"step": 3, "step_time_s": 2.5})
    (tmp_path / "first_start").write_text("1000.0\n")
    found = measure(tmp_path, until=1013.0)
    assert found is not None and (found.kept_s, found.elapsed_s, found.share) == (6.5, 13.0, 0.5)
    assert str(found).startswith("50.0 %: 6.5 s of 13.0 s")
    earlier = measure(tmp_path, begun=987.0, until=1013.0)
    assert earlier is not None and earlier.share == 0.25
    later = measure(tmp_path, begun=1010.0, until=1013.0)
    assert later is not None and later.share == 0.5, "the run itself knows of an earlier start"


def test_a_run_without_a_step_has_none(tmp_path: Path) -> None:
    assert measure(tmp_path) is None
    write_steps(tmp_path)
    assert measure(tmp_path) is None


def test_the_meter_goes_on_over_restarts_and_rollbacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: clock[0])
    first = GoodputMeter(tmp_path, begun=990.0)
    for step in (1, 2):
        record = {"step": step, "step_time_s": 4.0}
        first.add(record)
        write_steps(tmp_path, record)
    clock[0] = 1010.0
    assert (first.now().kept_s, first.now().elapsed_s) == (8.0, 20.0)
    clock[0] = 1022.0
    second = GoodputMeter(tmp_path, begun=1021.0)
    assert (second.now().kept_s, second.now().elapsed_s) == (8.0, 32.0)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "step_time_s": 4.0}) + "\n")
    second.recount()
    assert second.now().share == 4.0 / 32.0
    assert second.now() == measure(tmp_path, until=1022.0)


def test_by_default_a_run_begins_when_its_process_does(tmp_path: Path) -> None:
    assert GoodputMeter(tmp_path).first_start <= time.time() - 0.05


def test_a_run_from_before_the_file_begins_with_its_oldest_report(tmp_path: Path) -> None:
    for name, age in (("environment.json", 5.0), ("environment-0.json", 70.0)):
        (tmp_path / name).write_text("{}")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_steps(tmp_path, {"step": 1, "step_time_s": 7.0})
    found = measure(tmp_path)
    assert found is not None and found.share == pytest.approx(0.1, abs=0.01)
