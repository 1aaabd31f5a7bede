"""What a person sees while a run goes on: a progress bar on a terminal, plain dated lines anywhere else; and logging.

Everything goes through one place, so that a log line never tears the progress bar. Ranks above 0 show warnings only.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megavlm.tracking.ranks import size

ROOT = "megavlm"
_REFRESH_PER_S = 2  # the bar's thread must not take time from training on a small machine

_console: Console | None = None


def get_logger(name: str = ROOT) -> logging.Logger:
    """Logger below "megavlm"; pass `__name__`. Silent below warnings until `setup_logging` was called."""
    return logging.getLogger(name if name == ROOT or name.startswith(f"{ROOT}.") else f"{ROOT}.{name}")


def setup_logging(rank: int = 0, world_size: int = 1, stream: TextIO | None = None, level: int = logging.INFO) -> Console:
    """Send the package's log to `stream` (None: stderr) with the time and, in a run of several ranks, the rank.

    Rank 0 shows `level` and above, other ranks warnings and above. Calling it again replaces the earlier set-up.
    Other libraries' loggers and the root logger are left alone.
    """
    global _console
    _console = Console(file=stream or sys.stderr, soft_wrap=True)
    who = f" [rank {rank}]" if world_size > 1 else ""
    handler = _ConsoleHandler(_console)
    handler.setFormatter(logging.Formatter(f"%(asctime)s{who} %(levelname)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    logger = logging.getLogger(ROOT)
    for old in [h for h in logger.handlers if isinstance(h, _ConsoleHandler)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(level if rank == 0 else max(level, logging.WARNING))
    logger.propagate = False
    return _console


class _ConsoleHandler(logging.Handler):
    """Prints through rich, which lifts the progress bar out of the way; brackets in a message stay what they are."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if self._console.file.closed:  # at the interpreter's end the stream may be gone before the last message
            return
        try:
            self._console.print(self.format(record), markup=False, highlight=False, soft_wrap=True)
        except Exception:  # logging's own rule: a log line never ends the program
            self.handleError(record)


class TrainingDisplay:
    """Progress of the stages, for rank 0.

    Args:
        log_every_steps: interval of lines where there is no terminal; a stage's first and last step always get one.
        console: where to; None: the one of `setup_logging`, or a new one on stdout.
        interactive: draw a bar; None: when the console is a terminal.
        shows_mfu: False writes "mfu -": a measured peak is no more than a lower bound, of which a share may exceed 100 %.
    """

    def __init__(
        self, log_every_steps: int = 10, console: Console | None = None, interactive: bool | None = None, shows_mfu: bool = True
    ) -> None:
        self.console = console or _console or Console(file=sys.stdout, soft_wrap=True)
        self._interactive = self.console.is_terminal if interactive is None else interactive
        self._every, self._shows_mfu = log_every_steps, shows_mfu
        self._log = get_logger(ROOT)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._stage, self._total, self._first = "", 0, 0
        self._seconds_per_step: float | None = None
        self._peak = ""

    def stage_begins(self, stage: str, total_steps: int, first_step: int = 0) -> None:
        """Start showing `stage`: `total_steps` in all, of which `first_step` were done before (a resumed stage)."""
        self._end_bar()
        self._stage, self._total, self._first, self._seconds_per_step, self._peak = stage, total_steps, first_step, None, ""
        resumed = f", from step {first_step}" if first_step else ""
        self._log.info("stage %s: %d steps%s", stage, total_steps, resumed)
        if self._interactive:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[summary]}", markup=False),
                TimeElapsedColumn(),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self.console,
                refresh_per_second=_REFRESH_PER_S,
            )
            self._progress.start()
            self._task = self._progress.add_task(stage, total=total_steps, completed=first_step, summary="")

    def step(self, record: Mapping[str, Any]) -> None:
        """Show a step: moves the bar, or prints a line when one is due."""
        done = int(record.get("stage_step", record["step"]))
        if (seconds := record.get("step_time_s")) is not None:
            # A slow first step (compilation, cold caches) fades from the estimate with the steps that follow.
            old = self._seconds_per_step
            self._seconds_per_step = float(seconds) if old is None else 0.9 * old + 0.1 * float(seconds)
        if (memory := record.get("memory")) is not None:
            self._peak = f"  memory {size(int(memory['peak_bytes']))}"
        line = summary(record, self._shows_mfu) + self._peak
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, summary=line)
        elif done % self._every == 0 or done == self._first + 1 or done == self._total:
            eta = f"  eta {clock((self._total - done) * self._seconds_per_step)}" if self._seconds_per_step and done < self._total else ""
            self._log.info("%s %d/%d  %s%s", self._stage, done, self._total, line, eta)

    def message(self, text: str) -> None:
        """One line for the person who watches."""
        self._log.info("%s", text)

    def close(self) -> None:
        """Take the bar down."""
        self._end_bar()

    def _end_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._task = None, None


def summary(record: Mapping[str, Any], shows_mfu: bool = True) -> str:
    """A step in one line: what is in the record of loss, learning rate, speed, MFU, gradient norm and data wait."""
    parts = []
    if (loss := record.get("loss")) is not None:
        parts.append(f"loss {float(loss):.4f}")
    if (lr := record.get("lr")) is not None:
        # The fastest group stands for all; metrics.jsonl has each.
        rates = list(lr.values()) if isinstance(lr, Mapping) else [lr]
        if rates:
            parts.append(f"lr {max(float(r) for r in rates):.2e}")
    if (speed := record.get("tokens_per_s")) is not None:
        parts.append(f"{short_number(float(speed))} tokens/s")
    if (mfu := record.get("mfu")) is not None:
        parts.append(f"mfu {100 * float(mfu):.1f}%" if shows_mfu else "mfu -")
    if (norm := record.get("grad_norm")) is not None:
        parts.append(f"grad {float(norm):.2f}")
    wait, total = record.get("data_wait_s"), record.get("step_time_s")
    if wait is not None and total:
        parts.append(f"data wait {100 * float(wait) / float(total):.1f}%")
    return "  ".join(parts)


def short_number(value: float) -> str:
    """987 -> "987", 12345 -> "12.3k", 4500000 -> "4.50M"."""
    for limit, digits, unit in ((1e9, 2, "G"), (1e6, 2, "M"), (1e3, 1, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.{digits}f}{unit}"
    return f"{value:.0f}"


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}"
