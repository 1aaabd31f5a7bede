"""Incidents of a run: <run.dir>/incidents.jsonl, a line each, remembered over restarts."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch.distributed as dist

from megavlm.checkpoint import folders
from megavlm.checkpoint.resume import run_id
from megavlm.data.types import PackPlan, StepPlan
from megavlm.parallel.reductions import from_rank_zero
from megavlm.tracking.metrics import decode_line, encode_line
from megavlm.training.state import RunState

INCIDENTS_FILE = "incidents.jsonl"
_EARLIER = "earlier"
"""In place of the name of a run that had none."""
Incident = dict[str, Any]
"""What every line has: kind (nonfinite, spike, straggler, divergence, save_failed, and those of a checkpoint that was passed over), step,
stage, time_s (since 1970), run (its name for itself, `checkpoint.resume.run_id`). nonfinite and spike also action (skip, rollback, stop),
data_step (of the stage's data, from 0), loss, grad_norm, samples {source: rows}, and suspects: the microbatches whose own loss was not
finite. A rollback has to_step, and the data cursor that training went on from."""
_log = logging.getLogger(__name__)


class IncidentLog:
    """The incidents of the run so far, the same on every rank, which decide by them; rank 0 writes them down.

    Those of an earlier run in the same folder, whose checkpoints are gone, stay in the file and mean nothing here: another run has other
    data behind the same steps. Lines without a run's name, as they once were, are of the run whose checkpoint is there to go on from.

    Args:
        has_resumed: the run goes on from a checkpoint.
    """

    def __init__(self, run_dir: str | Path, *, has_resumed: bool) -> None:
        self.path = Path(run_dir) / INCIDENTS_FILE
        self._run = run_id(run_dir)
        if not has_resumed and dist.get_rank() == 0:
            _disown_unnamed(self.path)
        found = from_rank_zero(_read(self.path) if dist.get_rank() == 0 else None)
        self.incidents: list[Incident] = [entry for entry in found if entry.get("run", self._run) == self._run]

    def numbers(self) -> dict[str, int]:
        """How many there are of each kind."""
        return dict(Counter(entry["kind"] for entry in self.incidents))

    def add(self, incident: Mapping[str, Any]) -> Incident:
        """Note an incident that all ranks know of: each of them calls this."""
        entry = {**incident, "time_s": time.time(), "run": self._run}
        self.incidents.append(entry)
        if dist.get_rank() == 0:
            self.write_down(entry)
        return entry

    def write_down(self, incident: Mapping[str, Any]) -> None:
        """A line for an incident that only this rank, the one that writes, knows of: for people, nothing is decided by it."""
        try:
            with self.path.open("ab+") as file:
                if file.tell() and not _ends_a_line(file):  # torn by a crash: one bad line, not two
                    file.write(b"\n")
                file.write(f"{encode_line({'time_s': time.time(), 'run': self._run, **incident})}\n".encode())
        except OSError as error:
            _log.warning("%s could not be written (%s)", self.path, error)

    def number_with(self, incident: Mapping[str, Any], window_steps: int) -> int:
        """Incidents of the same stage and action within so many steps of this one, itself included. One that a restart met again on the
        same data counts once."""
        return len(
            {incident["data_step"]}
            | {
                entry["data_step"]
                for entry in self.incidents
                if all(entry.get(key) == incident[key] for key in ("action", "stage"))
                and abs(entry["step"] - incident["step"]) < window_steps
            }
        )

    def cursor_behind(self, stage: str, state: RunState) -> dict[str, Any] | None:
        """Where the data go on: behind those that a rollback to this very checkpoint left out, otherwise where `state` says.

        A run that ends before it has saved again would otherwise meet the same data once more.
        """
        here = state.cursor
        for entry in self.incidents:
            if entry.get("action") == "rollback" and (entry["stage"], entry["to_step"]) == (stage, state.step):
                there = entry["cursor"]
                if here is None or there["step"] > here["step"]:
                    here = there
        return here


def _ends_a_line(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _read(path: Path) -> list[Incident]:
    """Lines that a crash tore, or a full disk, are passed over: what is remembered must not keep a run from starting."""
    found = []
    with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(decode_line(line))
    return found


def _disown_unnamed(path: Path) -> None:
    """Say in lines without a run's name that they are of an earlier run: when this one resumes they must not be taken for its own."""

    def disowned(line: bytes) -> bytes:
        with contextlib.suppress(ValueError):
            entry = decode_line(line.decode())
            if "run" not in entry:
                return encode_line({**entry, "run": _EARLIER}).encode()
        return line

    try:
        lines = path.read_bytes().split(b"\n")
        named = [disowned(line) for line in lines]
        if named != lines:
            folders.write_bytes(path, b"\n".join(named))
    except FileNotFoundError:
        return
    except OSError as error:
        _log.warning("%s could not be rewritten (%s)", path, error)


def samples_of(plan: StepPlan) -> dict[str, list[int]]:
    """Rows of each source in a step, over all ranks."""
    return _rows(pack for rank in plan.assignment for microbatch in rank for pack in microbatch)


def suspects_of(plan: StepPlan, data_rank: int, bad_microbatches: tuple[int, ...]) -> list[dict[str, Any]]:
    """The microbatches whose own loss was not finite, over all ranks, with their samples; every rank calls this with its own."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, [(data_rank, number) for number in bad_microbatches])
    places = sorted({place for part in found for place in part})
    return [{"data_rank": rank, "microbatch": number, "samples": _rows(plan.assignment[rank][number])} for rank, number in places]


def _rows(packs: Any) -> dict[str, list[int]]:
    rows: dict[str, list[int]] = {}
    pack: PackPlan
    for pack in packs:
        for sample in pack.samples:
            rows.setdefault(sample.source, []).append(int(sample.row))
    return {source: sorted(found) for source, found in sorted(rows.items())}
