"""One run of `megavlm train` in processes of its own, that anything may happen to: started, watched, broken, started again, tidied up."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil  # type: ignore[import-untyped]

from megavlm.checkpoint import folders, listing
from megavlm.config.load import dump_recipe
from megavlm.config.schema import Recipe
from megavlm.testing.hung_disk import HungDisk
from megavlm.tracking.metrics import read_metrics

MARK = "MEGAVLM_TEST_RUN"
"""An environment variable that all of a run's processes inherit: whoever has it and is alive after the run is an orphan."""
BAD_STEPS = "MEGAVLM_TEST_BAD_STEPS"
START_TIMEOUT_S = 240.0
_RESUMING = re.compile(r"resuming at step (\d+)")
_SITE = """
import os
if os.environ.get("MEGAVLM_TEST_BAD_STEPS") and "RANK" in os.environ:
    from megavlm.testing.faults import bad_steps
    _kept = bad_steps({int(s): float("nan") for s in os.environ["MEGAVLM_TEST_BAD_STEPS"].split(",")})
    _kept.__enter__()
"""


def can_mount(folder: Path) -> bool:
    """Whether this process may make a file system: only root, and not in every container."""
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True, check=False)
    return mount.returncode == 0 and subprocess.run(["umount", str(folder)], check=False).returncode == 0


class FaultyRun:
    """with FaultyRun(folder, recipe) as run: ...  `folder` holds the recipe, the log and the run's folder; nothing outlives it."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dir, self.log = folder, Path(recipe.run.dir), folder / "log"
        self.recipe = folder / "recipe.yaml"
        dump_recipe(recipe, self.recipe)
        self.mark = uuid.uuid4().hex
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = 0
        self._is_mounted = False
        self._hung: HungDisk | None = None

    def start(self, *overrides: str, num_ranks: int = 2, bad_steps: str = "") -> None:
        """`megavlm train` with so many ranks, in the background."""
        assert self.process is None, "it runs already"
        site = self.folder / "site"
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(_SITE)
        path = os.pathsep.join([str(site), *(p for p in sys.path if p)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, MARK: self.mark, BAD_STEPS: bad_steps}
        command = [sys.executable, "-m", "megavlm.cli", "train", str(self.recipe), "--nproc", str(num_ranks), *overrides]
        self._log_start = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    # ------------------------------------------------------------------------------------------------------------ watching

    @property
    def output(self) -> str:
        """What the last start wrote, its ranks' logs behind it."""
        text = self.log.read_bytes()[self._log_start :].decode(errors="replace") if self.log.exists() else ""
        return text + "".join(p.read_text(errors="replace") for p in sorted(self.dir.glob("logs/rank*.log")))

    @property
    def step(self) -> int:
        """The last that was recorded; 0 before the first."""
        records = read_metrics(self.dir) if (self.dir / "metrics.jsonl").exists() else []
        return int(records[-1]["step"]) if records else 0

    @property
    def resumed_at(self) -> int | None:
        """The step that the last start went on from; None while it has not said so."""
        found = _RESUMING.findall(self.log.read_bytes()[self._log_start :].decode(errors="replace"))
        return int(found[-1]) if found else None

    def records(self) -> list[dict[str, Any]]:
        """Metrics, a record a step."""
        return read_metrics(self.dir)

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S, poll_s: float = 0.02) -> None:
        """Raises AssertionError with the end of the output when the run ends before, or when it takes too long."""
        end = time.monotonic() + timeout_s
        while not condition():
            assert self.process is not None and self.process.poll() is None, f"it ended before {what}:\n{self.output[-3000:]}"
            assert time.monotonic() < end, f"not {what} within {timeout_s:g} s:\n{self.output[-3000:]}"
            time.sleep(poll_s)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: self.step >= step, f"step {step}")

    def wait(self, timeout_s: float) -> int:
        """The exit code of the command. Raises AssertionError when it does not end."""
        assert self.process is not None
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.release_disk()
            stacks = "".join(p.read_text(errors="replace") for p in sorted(self.dir.glob("stacks/*")))
            raise AssertionError(f"it hangs: no end within {timeout_s:g} s\n{self.output[-3000:]}\n{stacks[-3000:]}") from None
        self.release_disk()
        self.process = None
        return code

    # ---------------------------------------------------------------------------------------------------------- processes

    def rank(self, number: int) -> psutil.Process:
        """A rank's process."""
        assert self.process is not None
        for process in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RANK") == str(number):
                    return process
        raise AssertionError(f"rank {number} does not run:\n{self.output[-2000:]}")

    def alive(self) -> list[psutil.Process]:
        """Every process that carries the run's mark."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def orphans(self, patience_s: float = 5.0) -> list[str]:
        """Command lines of what is still alive so long after the run has ended."""
        end = time.monotonic() + patience_s
        while (left := self.alive()) and time.monotonic() < end:
            time.sleep(0.1)
        return [" ".join(process.cmdline()) for process in left]

    # --------------------------------------------------------------------------------------------------------- checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.dir / folders.CHECKPOINTS

    def is_saving(self) -> bool:
        """Whether a checkpoint is half on the disk at this moment."""
        return any(self.checkpoints.glob(f"*{folders.UNFINISHED}"))

    @property
    def saved_step(self) -> int:
        """Step of the newest complete checkpoint; 0 before the first."""
        found = folders.newest(self.dir)
        return 0 if found is None else folders.step_and_stage(found.name)[0]

    def newest(self) -> Path:
        found = folders.newest(self.dir)
        assert found is not None, f"no complete checkpoint in {self.checkpoints}"
        return found

    def give_small_disk(self, size_bytes: int) -> None:
        """A file system of its own (tmpfs) for the checkpoints; called again, it changes its size. Root only."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        how = f"{'remount,' if self._is_mounted else ''}size={size_bytes}"
        subprocess.run(["mount", "-t", "tmpfs", "-o", how, "tmpfs", str(self.checkpoints)], check=True, capture_output=True)
        self._is_mounted = True

    def hang_disk(self) -> None:
        """From here to the end of the command the disk that holds the run's folder answers nobody who looks for a file. Root only."""
        self._hung = HungDisk(self.dir)
        self._hung.__enter__()

    def release_disk(self) -> None:
        """It answers again; nothing where it never hung."""
        if self._hung is not None:
            self._hung.__exit__(None, None, None)
            self._hung = None

    def damage_of_latest(self) -> list[str]:
        """What is wrong with the checkpoint that `latest` names, every byte compared; [] when it is good, or nothing was saved yet."""
        file = self.checkpoints / folders.LATEST
        return listing.damage(self.checkpoints / file.read_text(encoding="utf-8").strip()) if file.exists() else []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release_disk()
        for process in self.alive():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(30)
        if self._is_mounted:
            subprocess.run(["umount", "--lazy", str(self.checkpoints)], check=True)
