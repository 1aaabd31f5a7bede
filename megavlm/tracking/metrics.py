"""metrics.jsonl: one JSON line a step, the record of a run that needs no server.

Numbers that JSON lacks are written as the strings "NaN", "Infinity" and "-Infinity" (standard parsers refuse the bare
words), and `read_metrics` turns them back into floats. Nested dictionaries stay nested in the file; `flatten` joins
their keys with "/" where a flat name is needed (MLflow, curves).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megavlm.tracking.line_file import LineFile

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsError(ValueError):
    """A metrics file or record that cannot be what it should be."""


def to_plain(value: Any, where: str = "record") -> Any:
    """`value` as what JSON can hold: None, bool, int, float, str, list, dict; one-element tensors and arrays by `.item()`.

    Raises MetricsError naming the key when a value is none of these: a metric that cannot be written is a mistake.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(k): to_plain(v, f"{where}/{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "size", None) is not None:
        count = value.numel() if hasattr(value, "numel") else int(value.size)
        if count == 1:
            return value.item()
        raise MetricsError(f"{where} is a tensor of {count} elements: log a number, or one key for each element")
    if isinstance(value, Path):
        return str(value)
    raise MetricsError(f"{where} is a {type(value).__name__}: a metric is a number, a text, or a list or dictionary of these")


def encode_line(record: Mapping[str, Any]) -> str:
    """`record` as one line of JSON without the line's end; numbers that are not finite as strings."""
    try:
        return json.dumps(record, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):  # a tensor, a path, a number that is not finite: most lines have none, and are made once a step
        return json.dumps(_spell(to_plain(record)), allow_nan=False, ensure_ascii=False)


def decode_line(line: str) -> dict[str, Any]:
    """What `encode_line` wrote. Raises ValueError on anything else."""
    record = json.loads(line, object_hook=lambda found: {k: _unspell(v) for k, v in found.items()})
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__} instead of a dictionary")
    return record


def flatten(record: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Nested dictionaries as one, keys joined by `separator`: {"lr": {"vision": 1}} -> {"lr/vision": 1}."""
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}{separator}{inner}": v for inner, v in flatten(value, separator).items()})
        else:
            flat[str(key)] = value
    return flat


class MetricsWriter:
    """Appends one line per record and hands each to the operating system at once, so that a killed run keeps them. A full disk ends no run:
    lines wait in memory until it takes them (line_file.py).

    A run that continues from step N cuts lines with step > N (they will be written again) and a last line torn by a
    crash. What was cut is kept in <name>.cut.jsonl, should the earlier attempt be of interest.

    Args:
        run_dir: folder of the run, created when missing.
        resume_step: N, the last step whose line stays. 0: a run from its start.
        name: file in `run_dir`.
        one_per_step: refuse a second line for a step, and a step before the last one.
    """

    def __init__(self, run_dir: str | Path, resume_step: int = 0, name: str = METRICS_FILE, one_per_step: bool = True) -> None:
        self.path = Path(run_dir) / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._one_per_step = one_per_step
        self.num_cut_lines, self._last_step = cut_after(self.path, resume_step)
        self._file = LineFile(self.path)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append `record`, which needs an integer "step". Raises MetricsError as `check`."""
        self.check(record)
        self._file.append([encode_line(record)])
        self._last_step = record["step"]

    def check(self, record: Mapping[str, Any]) -> None:
        """Raises MetricsError when `record` has no step, or is out of order."""
        step = record.get("step")
        if not isinstance(step, int) or isinstance(step, bool):
            raise MetricsError(f"a record for {self.path.name} has step={step!r}: it needs the number of optimizer steps done")
        if self._one_per_step and self._last_step is not None and step <= self._last_step:
            raise MetricsError(f"{self.path.name} already holds step {self._last_step}, and step {step} was written after it")

    def close(self) -> None:
        self._file.close()


def cut_after(path: Path, step: int) -> tuple[int, int | None]:
    """Keep the lines of `path` up to `step`; the others move to *.cut.jsonl. Returns (lines cut, last step kept)."""
    if not path.exists():
        return 0, None
    kept: list[str] = []
    cut: list[str] = []
    last_step, is_torn = None, False
    for line, record in _lines(path):
        if record is not None and record.get("step", 0) <= step:
            kept.append(line)
            last_step = max(last_step or 0, record.get("step", 0))
        else:
            cut.append(line)
            is_torn = record is None
    if cut:
        with open(path.with_suffix(".cut.jsonl"), "a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in (cut[:-1] if is_torn else cut))  # what a crash tore is no record
        replacement = path.with_suffix(".new")
        replacement.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(replacement, path)
    return len(cut), last_step


def set_cut_aside(path: Path) -> None:
    """What was cut from `path` so far moves on to <name>.cut-<number>.jsonl, which `read_cut` does not read: it is of another MLflow run
    than what is written from now on. Raises OSError."""
    cut = path.with_suffix(".cut.jsonl")
    if cut.exists():
        names = (path.with_suffix(f".cut-{number}.jsonl") for number in itertools.count(1))
        cut.rename(next(name for name in names if not name.exists()))


def read_cut(path: Path, after_step: int) -> dict[int, list[dict[str, Any]]]:
    """What earlier starts of a run wrote into `path` of steps after this one, before it was cut: step -> their records. Not those of
    starts before the run last began at step 0 (`set_cut_aside`)."""
    cut, found = path.with_suffix(".cut.jsonl"), defaultdict(list)
    for _, record in _lines(cut) if cut.exists() else ():
        if record is not None and record.get("step", 0) > after_step:
            found[record["step"]].append(record)
    return found


def read_metrics(run_dir: str | Path, name: str = METRICS_FILE, every: int = 1) -> list[dict[str, Any]]:
    """`each_record` as a list."""
    return list(each_record(run_dir, name, every))


def each_record(run_dir: str | Path, name: str = METRICS_FILE, every: int = 1) -> Iterator[dict[str, Any]]:
    """Records of a run in order; every `every`-th for a quick look at a long one (the last is always there).

    A last line torn by a crash, or half written by a run that goes on, is left out. Raises MetricsError when the
    file is missing, or when another line is not one that was written here.
    """
    path = Path(run_dir) / name
    if not path.exists():
        raise MetricsError(f"{path} does not exist: is {run_dir} the folder of a run that made its first step?")
    return (record for _, record in _lines(path, every) if record is not None)


def count_lines(path: Path) -> int:
    """Lines of a file, read in blocks: a run of half a million steps has hundreds of megabytes."""
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def _lines(path: Path, every: int = 1) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """(line, record) of a file; record is None for a torn last line."""
    last = count_lines(path) - 1 if every > 1 else 0
    with open(path, encoding="utf-8", errors="replace") as file:
        for i, line in enumerate(file):
            if i % every and i != last:
                continue
            try:
                yield line.rstrip("\n"), decode_line(line)
            except ValueError as error:
                if line.endswith("\n"):
                    raise MetricsError(f"{path}, line {i + 1} is not a record ({error}): repair or delete that line") from error
                yield line, None


def _spell(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {k: _spell(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_spell(v) for v in value]
    return value


def _unspell(value: Any) -> Any:
    if isinstance(value, str):
        return _NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_unspell(v) for v in value]
    return value
