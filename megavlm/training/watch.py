"""Watches the steps of a stage: the parts of each step's time, the memory of ranks, and the profile that tracking.profile asks for."""

from __future__ import annotations

import gzip
import os
import shutil
import socket
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.config.schema import Recipe, StageConfig
from megavlm.data.types import StepPlan
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.step_parts import CudaStamps, wrap_collectives
from megavlm.planner.memory import RankMemory
from megavlm.tracking.ranks import RankReport, mean_times, memory_line, memory_record, time_line
from megavlm.tracking.stragglers import StragglerWatch
from megavlm.tracking.timeline import RankTimeline, StepSpan, write_timeline
from megavlm.tracking.timers import PARTS, Segment, StepClock, WallStamps, use_clock
from megavlm.tracking.tracker import Tracker
from megavlm.training.incidents import IncidentLog
from megavlm.training.memory import MemoryWatch

PROFILE_FOLDER = "profile"
LINES_PER_TIME_LINE = 50
"""Lines of the console for each that says where time goes."""


class StepWatch:
    """One stage's. Every rank calls the same methods at the same steps."""

    def __init__(
        self, recipe: Recipe, stage: StageConfig, ctx: ParallelContext, tracker: Tracker, memory: MemoryWatch, incidents: IncidentLog
    ) -> None:
        wanted = recipe.tracking.profile
        self.ctx, self.tracker, self.memory, self.stage = ctx, tracker, memory, stage.name
        self._every, self._num_stage_steps = recipe.tracking.log_every_steps, stage.steps
        self._num_steps = 0
        self._recent, self._steady = _MeanTimes(), _MeanTimes()
        self._stamps = CudaStamps() if ctx.device.type == "cuda" else WallStamps()
        self._first = wanted.first_step
        self._last = -1 if self._first is None else self._first + wanted.steps - 1
        ranks = wanted.trace_ranks
        self._traces = ranks == "all" if isinstance(ranks, str) else ctx.rank in ranks
        self._folder = Path(recipe.run.dir) / PROFILE_FOLDER
        self._profile: _Profile | None = None
        self._step = 0
        is_timed = recipe.tracking.step_parts or self._first is not None
        self._reports = recipe.tracking.step_parts
        self._clock = StepClock(self._stamps) if is_timed else None
        self._incidents, self._stragglers = incidents, self._watch_stragglers(recipe)
        if is_timed:
            wrap_collectives()
        use_clock(self._clock)

    def _watch_stragglers(self, recipe: Recipe) -> StragglerWatch | None:
        factor = recipe.faults.straggler_factor
        if factor is None or self.ctx.grid.world_size == 1:
            return None
        if not self._reports:
            self.tracker.message("slow ranks are not looked for (faults.straggler_factor): tracking.step_parts is false")
            return None
        places: list[Any] = [None] * self.ctx.grid.world_size
        dist.all_gather_object(places, _machine(self.ctx.device))
        return StragglerWatch(factor, recipe.faults.straggler_reports, dict(enumerate(places)))

    def begin_step(self, step: int) -> None:
        """`step` (from 1, over all stages) begins."""
        self._step = step
        if self._profile is None and self._first is not None and step == self._first:
            self._profile = _Profile(self._folder, f"{self.stage}-step-{step}", self.ctx, self._traces, self._stamps)
        if self._clock is not None:
            self._clock.begin_step()

    def finish_step(self, plan: StepPlan, stage_step: int) -> dict[str, Any]:
        """The step of `plan`, the stage's `stage_step`-th from 1, is done. Returns what its record says of time and memory: `time_s`
        (unless tracking.step_parts=false), and where all ranks tell of theirs `memory` and `all_ranks_time_s`."""
        parts = self._parts()
        self.memory.saw(plan)
        self._num_steps += 1
        if self._num_steps == 2:
            # The first step starts up libraries and makes the optimizer's state.
            self._recent, self._steady = _MeanTimes(), _MeanTimes()
        found: dict[str, Any] = {}
        if self._reports:
            self._recent.add(parts)
            self._steady.add(parts)
            found["time_s"] = parts
        if self._num_steps == 2 or stage_step % self._every == 0 or stage_step == self._num_stage_steps:
            found |= self._of_all_ranks(tells=stage_step % (LINES_PER_TIME_LINE * self._every) == 0)
        return found

    def _parts(self) -> dict[str, float]:
        """Seconds of each part of the step; a profile takes them too."""
        if self._clock is None:
            return {}
        if self._profile is not None and self.ctx.device.type == "cuda":
            torch.cuda.synchronize()
        parts = self._clock.finish_step()
        if self._profile is not None:
            self._profile.add(self._step, self._clock)
            if self._step == self._last:
                self._write()
        return parts

    def _of_all_ranks(self, *, tells: bool) -> dict[str, Any]:
        reports = self._gather(self._recent)
        self._recent = _MeanTimes()
        if not reports:
            return {}
        times = mean_times(reports)
        if tells and times:
            self.tracker.message(time_line(times, len(reports)))
        slowest = self._find_stragglers(reports)
        return {
            "memory": memory_record(reports),
            **({"all_ranks_time_s": times} if times else {}),
            **({"straggler": slowest} if slowest else {}),
        }

    def _find_stragglers(self, reports: list[RankReport]) -> dict[str, Any]:
        """On the rank that has the reports."""
        if self._stragglers is None:
            return {}
        slowest, named = self._stragglers.look(reports)
        for straggler in named:
            self._incidents.write_down(
                {"kind": "straggler", "step": self._step, "stage": self.stage, "rank": straggler.rank, "skew": straggler.skew}
                | {"text": straggler.text}
            )
            self.tracker.incident("straggler", self._step, straggler.text)
        return slowest

    def _gather(self, times: _MeanTimes) -> list[RankReport]:
        """What every rank says, on the rank that writes; nothing on others."""
        mine = [self.memory.peak_bytes, self.memory.reserved_bytes or 0, *times.seconds().values()]
        # Exact: fp64 counts bytes up to 8 PiB.
        sent = torch.tensor(mine, dtype=torch.float64, device=self.ctx.device)
        found = [torch.empty_like(sent) for _ in range(self.ctx.grid.world_size)]
        dist.all_gather(found, sent)
        if not self.tracker.writes:
            return []
        estimates = [_by_part(e) for e in self.memory.estimates()]
        has_reserved, reports = self.memory.reserved_bytes is not None, []
        for rank, (peak, reserved, *seconds) in enumerate(torch.stack(found).tolist()):
            place = self.ctx.grid.coordinates(rank)
            reports.append(
                RankReport(
                    rank=rank,
                    place=place._asdict(),
                    peak_bytes=int(peak),
                    estimated_bytes=estimates[place.pipeline],
                    reserved_bytes=int(reserved) if has_reserved else None,
                    time_s=dict(zip(PARTS, seconds, strict=True)) if self._reports else None,
                )
            )
        return reports

    def close(self) -> None:
        """The stage is over: what of a profile there is is written."""
        use_clock(None)
        if self._profile is not None:
            self._profile.stop_trace()
            self._profile = None

    def end(self) -> None:
        """All ranks have made their last step of the stage, for now."""
        if self._profile is not None and self._profile.has_steps:
            self._write()
        if self._num_steps and (reports := self._gather(self._steady)):
            self.tracker.ranks(self.stage, reports)
            if times := mean_times(reports):
                self.tracker.message(time_line(times, len(reports)))
            self.tracker.message(memory_line(reports))

    def _write(self) -> None:
        assert self._profile is not None
        picture = self._profile.write()
        if picture is not None:
            self.tracker.message(f"profile of {self.stage}: {picture.parent}")
            self.tracker.artifact(picture.parent, PROFILE_FOLDER)
        self._profile = None


class _MeanTimes:
    """Seconds of each part of a step, over several."""

    def __init__(self) -> None:
        self._sums, self._number = dict.fromkeys(PARTS, 0.0), 0

    def add(self, parts: Mapping[str, float]) -> None:
        for part, seconds in parts.items():
            self._sums[part] += seconds
        self._number += 1

    def seconds(self) -> dict[str, float]:
        """The means, in the order of PARTS."""
        return {part: total / max(self._number, 1) for part, total in self._sums.items()}


def _machine(device: torch.device) -> str:
    """Host and device of this rank, for whoever has to go and look."""
    host = socket.gethostname()
    if device.type != "cuda":
        return f"{host}, process {os.getpid()}"
    properties = torch.cuda.get_device_properties(device)
    return f"{host}, GPU {device.index}, UUID {getattr(properties, 'uuid', 'unknown')}"


def _by_part(estimate: RankMemory) -> dict[str, int]:
    """Part of the memory (parameters, activations, ...) -> bytes; they add up to the total."""
    return {f.name.removesuffix("_bytes"): getattr(estimate, f.name) for f in fields(estimate) if f.name.endswith("_bytes")}


class _Profile:
    """Some steps of this rank, under way."""

    def __init__(self, parent: Path, name: str, ctx: ParallelContext, traces: bool, stamps: Any) -> None:
        self.ctx, self._stamps = ctx, stamps
        self._folder = _new_folder(parent, name, ctx)
        self._segments: list[Segment] = []
        self._steps: list[StepSpan] = []
        self._trace: torch.profiler.profile | None = None
        if traces:
            activities = [torch.profiler.ProfilerActivity.CPU]
            if ctx.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            self._trace = torch.profiler.profile(activities=activities, record_shapes=True)
            self._trace.start()
        # Ranks' clocks tell different times: the zero of each is when all have come here.
        dist.barrier()
        self._zero = stamps.now()

    @property
    def has_steps(self) -> bool:
        return bool(self._steps)

    def add(self, step: int, clock: StepClock) -> None:
        """A step is done."""
        start = self._stamps.seconds(self._zero, clock.origin)
        own = [s._replace(begin_s=s.begin_s + start, end_s=s.end_s + start) for s in clock.segments]
        self._segments += own
        self._steps.append(StepSpan(step, own[0].begin_s, own[-1].end_s))

    def stop_trace(self) -> None:
        """End the torch profiler and write its file, without a word to other ranks."""
        if self._trace is None:
            return
        self._trace.stop()
        plain = self._folder / f"rank-{self.ctx.rank}.trace.json"
        self._trace.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(f"{plain}.gz", "wb", compresslevel=5) as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
        self._trace = None

    def write(self) -> Path | None:
        """Traces, and on rank 0 the picture and the page of all ranks; returns the picture's path there."""
        self.stop_trace()
        place = self.ctx.grid.coordinates(self.ctx.rank)
        label = f"rank {self.ctx.rank}: data {place.data}, stage {place.pipeline}, context {place.context}, tensor {place.tensor}"
        mine = RankTimeline(label, self._segments, self._steps)
        found: list[RankTimeline | None] = [None] * self.ctx.grid.world_size
        dist.gather_object(mine, found if self.ctx.rank == 0 else None)
        return write_timeline(self._folder, [f for f in found if f is not None]) if self.ctx.rank == 0 else None


def _new_folder(parent: Path, name: str, ctx: ParallelContext) -> Path:
    """A folder that no earlier run has written to, the same on every rank."""
    chosen: list[Any] = [None]
    if ctx.rank == 0:
        number = 1
        while (folder := parent / (name if number == 1 else f"{name}-{number}")).exists():
            number += 1
        folder.mkdir(parents=True)
        chosen = [folder]
    dist.broadcast_object_list(chosen)
    return Path(chosen[0])
