"""Sections in processes of their own: what one raises, crashes on or does not finish costs no other anything.

A section is a list of tasks. Its process writes a line of JSON for each task as it ends, so that neither a crash nor the time limit loses
what was done; where the process dies, another goes on behind the task that killed it. So a kernel that poisons a GPU's context ruins one
figure.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
FRESH_PROCESS = 75
"""Exit code of a process that wants the rest of its tasks done in a new one."""
MOST_LEFT_BYTES = 2 << 30
"""On a GPU: more than this still allocated behind a task, and the next one gets a new process."""
POLL_S = 0.1
LOG_CHARACTERS = 2000
"""Of a dead process's output, kept with its error."""


class Unavailable(Exception):
    """A task cannot be done on this machine: no failure, and its reason goes into the report."""


@dataclass(frozen=True)
class Place:
    """Where a section runs."""

    device: str
    """cuda, or cpu: everything at tiny size."""
    folder: str
    """For files, shared by the sections of a run."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Section -> task -> result, of what ran before."""
    options: Mapping[str, Any] = field(default_factory=dict)
    limit_s: float = 60.0
    """Of the section."""

    @property
    def tiny(self) -> bool:
        return self.device == "cpu"

    def fact(self, section: str, task: str, key: str) -> Any:
        """A figure of an earlier section; None where it was not measured."""
        return self.facts.get(section, {}).get(task, {}).get(key)


Task = Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Section:
    """What is measured together."""

    name: str
    module: str
    """Has `tasks(section, place)` -> {task: function that returns its figures}."""
    limit_s: float
    hides: tuple[str, ...] = ()
    """Packages that its processes take for not installed."""


def work(section: Section, place: Place, rows: Path, skip: list[str]) -> int:
    """In the section's process: do the tasks that are not in `skip`, a line of `rows` for each. Returns the exit code."""
    for name in section.hides:
        sys.modules[name] = None  # type: ignore[assignment]
    with rows.open("a", encoding="utf-8", buffering=1) as file:

        def write(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")

        tasks = importlib.import_module(section.module).tasks(section.name, place)
        write({"tasks": list(tasks)})
        remaining = [name for name in tasks if name not in skip]
        for number, name in enumerate(remaining, 1):
            write({"begins": name})
            start, row = time.perf_counter(), {"task": name}
            try:
                row["result"] = tasks[name]()
            except Unavailable as reason:
                row["unavailable"] = str(reason)
            except Exception:
                row["error"] = traceback.format_exc()
            write({**row, "seconds": round(time.perf_counter() - start, 2)})
            if number < len(remaining) and place.device == "cuda" and not _is_clean():
                return FRESH_PROCESS
    return 0


def _is_clean() -> bool:
    """Does the GPU still answer, with its memory given back?"""
    import torch

    try:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated() < MOST_LEFT_BYTES
    except Exception:  # after an illegal access every call raises
        return False


class SectionRun:
    """A section under way, seen from outside. `report` is what is known of it at any time."""

    def __init__(self, section: Section, command: list[str], log: Path, limit_s: float, on_row: Callable[[dict[str, Any]], None]) -> None:
        self.section, self._command, self._log, self._limit_s, self._on_row = section, command, log, limit_s, on_row
        self._rows = log.with_suffix(".jsonl")
        self._tasks: list[str] = []
        self._done: dict[str, dict[str, Any]] = {}
        self._current: str | None = None
        self._start = time.monotonic()
        self._trouble: str | None = None
        self._is_over = False

    @property
    def report(self) -> dict[str, Any]:
        """{status, seconds, results {task: figures}, unavailable {task: reason}, errors {task: traceback}}."""
        kinds = {"results": "result", "unavailable": "unavailable", "errors": "error"}
        found = {plural: {name: row[kind] for name, row in self._done.items() if kind in row} for plural, kind in kinds.items()}
        if self._trouble is not None:
            found["errors"]["section"] = self._trouble
        status = "running" if not self._is_over else "failed" if found["errors"] else "ok"
        seconds = {name: row["seconds"] for name, row in self._done.items() if "seconds" in row}
        return {"status": status, "seconds": round(time.monotonic() - self._start, 1), "limit_s": self._limit_s, **found, "task_s": seconds}

    def run(self) -> dict[str, Any]:
        """Until all tasks are done or the limit is reached."""
        while self._left_s() > 0:
            before = len(self._done)
            code = self._one_process()
            if code is None:
                self._give_up(f"not done within the section's {self._limit_s:.0f} s")
                break
            if code not in (0, FRESH_PROCESS):
                self._died(code)
            if code == 0 or not self._missing() or len(self._done) == before:
                break
        if self._missing() and self._trouble is None:
            self._give_up(f"not done within the section's {self._limit_s:.0f} s")
        self._is_over = True
        return self.report

    def _left_s(self) -> float:
        return self._limit_s - (time.monotonic() - self._start)

    def _missing(self) -> list[str]:
        return [name for name in self._tasks if name not in self._done]

    def _one_process(self) -> int | None:
        """Exit code; None when the limit came first and the process was killed."""
        self._current = None
        read = self._rows.stat().st_size if self._rows.exists() else 0
        with self._log.open("a", encoding="utf-8") as log:
            command = [*self._command, "--rows", str(self._rows), "--skip", json.dumps(list(self._done))]
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, env=environment(), start_new_session=True)
            try:
                while process.poll() is None and self._left_s() > 0:
                    time.sleep(POLL_S)
                    read = self._read(read)
            finally:
                _kill_group(process)
        self._read(read)
        return process.returncode if self._left_s() > 0 or process.returncode == 0 else None

    def _read(self, position: int) -> int:
        """Take in whole new lines; returns where they end."""
        if not self._rows.exists():
            return position
        with self._rows.open("rb") as file:
            file.seek(position)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                position += len(line)
                self._take(json.loads(line))
        return position

    def _take(self, row: dict[str, Any]) -> None:
        if "tasks" in row:
            self._tasks = row["tasks"]
        elif "begins" in row:
            self._current = row["begins"]
        else:
            self._done[row["task"]] = row
            self._on_row(row)

    def _died(self, code: int) -> None:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        told = f"the process ended ({how}); its last words:\n{self._log.read_text(errors='replace')[-LOG_CHARACTERS:]}"
        if self._current is None or self._current in self._done:
            self._trouble = told
        else:
            self._take({"task": self._current, "error": told})

    def _give_up(self, reason: str) -> None:
        for name in self._missing():
            self._take({"task": name, "error": reason + (": it was under way" if name == self._current else ": it had not begun")})
        if not self._tasks:
            self._trouble = f"{reason}: no task had begun\n{self._log.read_text(errors='replace')[-LOG_CHARACTERS:]}"


def _kill_group(process: subprocess.Popen[Any]) -> None:
    """The process and whatever it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment() -> dict[str, str]:
    """For processes of the checkout, whether or not it is installed."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "launchers"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**os.environ, **quiet, "PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
