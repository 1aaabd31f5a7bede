"""benchmarks/gpu_validate.py: what a task raises, crashes on or does not finish is reported and costs the others nothing; its CPU form."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megavlm.checkpoint import folders
from megavlm.testing.pool import RankPool

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
TASKS = """
import os, time
from gpu.runner import Unavailable
def absent(): raise Unavailable("no such chip")
def broken(): raise ValueError("three is not four")
def tasks(section, place):
    made = {"fine": lambda: {"seen": place.fact("before", "task", "figure")}, "absent": absent, "broken": broken,
            "dies": lambda: os._exit(9), "after": lambda: {"hidden": hidden()}}
    return made | ({"hangs": lambda: time.sleep(600), "late": lambda: {}} if place.options.get("hangs") else {})
def hidden():
    try:
        import wave
    except ImportError:
        return True
    return False
"""
CHILD = """
import json, sys
from pathlib import Path
from gpu.runner import Place, Section, work
options, _, rows, _, skip = sys.argv[1:]
place = Place("cpu", ".", {"before": {"task": {"figure": 7}}}, json.loads(options))
sys.exit(work(Section("fake", "fake_tasks", 60, hides=("wave",)), place, Path(rows), json.loads(skip)))
"""


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Modules of benchmarks/gpu."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield lambda name: importlib.import_module(f"gpu.{name}")
    for name in [n for n in sys.modules if n == "gpu" or n.startswith("gpu.")]:
        del sys.modules[name]


def run_fake(
    parts: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, limit_s: float, **options: bool
) -> tuple[dict[str, Any], list[str]]:
    runner = parts("runner")
    (folder / "fake_tasks.py").write_text(TASKS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHMARKS), str(folder)]))
    told: list[str] = []
    section = runner.Section("fake", "fake_tasks", limit_s)
    command = [sys.executable, "-c", CHILD, json.dumps(options)]
    run = runner.SectionRun(section, command, folder / "fake.log", limit_s, lambda row: told.append(row["task"]))
    return run.run(), told


def test_a_crash_costs_one_task(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, told = run_fake(parts, tmp_path, monkeypatch, 120.0)
    assert report["status"] == "failed" and told == ["fine", "absent", "broken", "dies", "after"]
    assert report["results"] == {"fine": {"seen": 7}, "after": {"hidden": True}}
    assert report["unavailable"] == {"absent": "no such chip"}
    assert set(report["errors"]) == {"broken", "dies"}
    assert "Traceback" in report["errors"]["broken"] and "three is not four" in report["errors"]["broken"]
    assert "exit code 9" in report["errors"]["dies"]


def test_the_limit_ends_what_hangs(parts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report, _ = run_fake(parts, tmp_path, monkeypatch, 15.0, hangs=True)
    assert report["status"] == "failed" and "after" in report["results"] and report["seconds"] < 60
    assert report["errors"]["hangs"].endswith("it was under way") and report["errors"]["late"].endswith("it had not begun")


def test_a_section_that_does_not_begin_is_told(parts: Any, tmp_path: Path) -> None:
    runner = parts("runner")
    section = runner.Section("fake", "nowhere", 30.0)
    command = [sys.executable, "-c", "raise SystemExit('no such module')"]
    report = runner.SectionRun(section, command, tmp_path / "fake.log", 30.0, lambda row: None).run()
    assert report["status"] == "failed" and "no such module" in report["errors"]["section"]


def sections(bf16: float, fp8: float, decode: float) -> dict[str, Any]:
    """Results with an MFU, and speeds relative to bf16 and to Pillow."""
    run = {"tokens_per_s": 100.0, "mfu": bf16, "losses": [9.0, 8.0, 2.0, 2.0]}
    tests = {"collected": 5, "passed": 4, "skipped": 1, "failed": 0, "ended_early": False, "note": ""}
    results: dict[str, Any] = {
        "training_local": {"bf16": run, "fp8 rowwise": {**run, "tokens_per_s": 90.0, "losses": [1.0, 1.0, 2.0, 2.2]}},
        "training_te": {"bf16": {**run, "mfu": 0.1}, "fp8 current": {**run, "tokens_per_s": 100.0 * fp8}},
        "decode": {"pillow, one core": {"pictures_per_s": 10.0}, "dali, 8 threads": {"pictures_per_s": 10.0 * decode}},
        "tests": {"pytest": tests},
        "resume": {"bit-exact": {"same": True}},
    }
    return {name: {"results": found} for name, found in results.items()}


def test_goals(parts: Any) -> None:
    goals = parts("goals").goals
    met = goals(sections(0.6, 1.4, 12.0), tiny=False)
    assert [met[name]["met"] for name in ("bf16_mfu", "fp8_speed_up", "decode_speed_up", "tests", "bit_exact_resume")] == [True] * 5
    assert met["fp8_speed_up"]["figure"] == pytest.approx(1.4)
    assert met["loss_gap"]["figure"]["local fp8 rowwise"] == pytest.approx(0.05)
    missed = goals(sections(0.5, 1.2, 9.0), tiny=False)
    assert [missed[name]["met"] for name in ("bf16_mfu", "fp8_speed_up", "decode_speed_up")] == [False] * 3
    tiny = goals(sections(0.6, 1.4, 12.0), tiny=True)
    assert [tiny[name]["met"] for name in ("bf16_mfu", "fp8_speed_up", "decode_speed_up")] == [None] * 3
    assert all(goal["met"] is None for goal in goals({}, tiny=False).values())


def test_a_failed_test_or_an_early_end_is_no_success(parts: Any) -> None:
    found = sections(0.6, 1.4, 12.0)
    tests = found["tests"]["results"]["pytest"]
    tests["ended_early"] = True
    assert parts("goals").goals(found, tiny=False)["tests"]["met"] is None
    tests["failed"] = 1
    assert parts("goals").goals(found, tiny=False)["tests"]["met"] is False


def test_counts_of_junit(parts: Any, tmp_path: Path) -> None:
    cases = [
        '<testcase classname="a" name="one"/>',
        '<testcase classname="a" name="two"><failure message="assert 1 == 2">x</failure></testcase>',
        '<testcase classname="a" name="three"><skipped message="needs two GPUs">x</skipped></testcase>',
        '<testcase classname="a" name="four"><error message="no fixture">x</error></testcase>',
    ]
    (tmp_path / "junit.xml").write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    found = parts("basics").read_junit(tmp_path / "junit.xml")
    assert found == {
        "collected": 4,
        "passed": 1,
        "skipped": 1,
        "failed": 2,
        "failures": {"a::two": "assert 1 == 2", "a::four": "no fixture"},
        "reasons_to_skip": {"needs two GPUs": 1},
    }


def trained(folder: Path) -> dict[str, Any]:
    """A variant of the section training_local at tiny size, in a rank of the pool."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        runner, training = importlib.import_module("gpu.runner"), importlib.import_module("gpu.training")
        found: dict[str, Any] = training.measure("training_local", "bf16", runner.Place("cpu", str(folder)))
        return found
    finally:
        sys.path.remove(str(BENCHMARKS))
        for name in [n for n in sys.modules if n == "gpu" or n.startswith("gpu.")]:
            del sys.modules[name]


def test_a_variant_trains_to_its_end_and_writes_no_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    """Through the training loop of today, parts of which the section replaces."""
    found = pool.run(trained, tmp_path)[0]
    assert found["steps"] == 3 and len(found["losses"]) == 6 and found["mfu"] > 0 and found["tokens_per_s"] > 0
    (run,) = (tmp_path / "runs").iterdir()
    assert not folders.named(run)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_section_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    command = [sys.executable, str(BENCHMARKS / "gpu_validate.py"), "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    report = json.loads(out.read_text())
    assert done.returncode == 0, json.dumps({name: s["errors"] for name, s in report["sections"].items() if s["errors"]}, indent=1)
    assert report["tiny"] and "every section ran at tiny size on the CPU" in report["note"] and report["note"] in done.stderr
    wanted = ["environment", "ceilings", "training_local", "training_te", "kernels", "head", "resume", "decode", "tests"]
    assert list(report["sections"]) == wanted
    kernels = report["sections"]["kernels"]
    measured = {name.split()[0] for name in kernels["results"]}
    here = {path.parent.name for path in (ROOT / "kernels" / "megavlm_kernels").glob("*/op.py")}
    assert here - measured == {"context_attention"} and "context_attention" in kernels["unavailable"]
    assert report["goals"]["bit_exact_resume"]["met"] is True
    tests = report["sections"]["tests"]["results"]["pytest"]
    assert tests["collected"] == tests["skipped"] > 100
    for run in report["sections"]["training_local"]["results"].values():
        assert run["losses"] == pytest.approx(report["sections"]["training_local"]["results"]["bf16"]["losses"], rel=1e-2)
    assert all(report["goals"][name]["met"] is None for name in ("bf16_mfu", "fp8_speed_up", "decode_speed_up"))
