"""The training loop: stages one after the other, each a grid, a model, a stream of data and a number of steps.

for each stage:
    enter its grid            -> ParallelContext
    build and fill its model  -> StageModel       (weights: the newest checkpoint that has each module)
    open its data             -> StageData        (from the cursor)
    step, record, evaluate, save, until done or asked to stop
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.checkpoint.saver import Outcome
from megavlm.config.load import dump_recipe
from megavlm.config.schema import ParallelConfig, Recipe, StageConfig
from megavlm.data.plan import EndOfData
from megavlm.data.types import StepData
from megavlm.parallel.context import ParallelContext, enter_grid, leave_grid
from megavlm.planner.precision import choose_fp8
from megavlm.tracking.timers import part
from megavlm.tracking.tracker import Tracker
from megavlm.training.accounting import Accountant
from megavlm.training.answers import HeldOutAnswers
from megavlm.training.build import StageModel
from megavlm.training.checkpointing import Checkpointer, prepare_model
from megavlm.training.data import RunData, StageStream
from megavlm.training.faults import Finding, RollBack, StepJudge, TrainingFailure, describe, roll_back, settle, tell_passed_over
from megavlm.training.incidents import IncidentLog
from megavlm.training.layout import settled_layout, stage_layout
from megavlm.training.loss_scale import scale_of
from megavlm.training.memory import MemoryWatch
from megavlm.training.optimizer import set_learning_rate
from megavlm.training.pictures import log_sample_pictures
from megavlm.training.replicas import check_replicas
from megavlm.training.sections import Sections
from megavlm.training.signals import StopRequest
from megavlm.training.state import RunState
from megavlm.training.step import StepLoss, measure, train_step
from megavlm.training.watch import StepWatch
from megavlm_kernels.packed_attention import machine_of

_GOES_ON = "training goes on without this checkpoint"


@dataclass(frozen=True)
class _Run:
    """What the stages of a run share, and where it stands."""

    recipe: Recipe
    state: RunState
    data: RunData
    tracker: Tracker
    stop: StopRequest
    device: torch.device
    sections: Sections
    incidents: IncidentLog

    @property
    def stage(self) -> StageConfig:
        """The one that is next, or under way."""
        return self.recipe.stages[self.state.stage_index]


@dataclass(frozen=True)
class _Built:
    """What a stage trains with: its grid, and what was built in it."""

    ctx: ParallelContext
    layout: ParallelConfig
    model: StageModel
    stream: StageStream
    held_out: list[StepData]
    checkpointer: Checkpointer
    watch: StepWatch


def run_stages(
    recipe: Recipe, state: RunState, data: RunData, tracker: Tracker, stop: StopRequest, device: torch.device, sections: Sections
) -> int:
    """Train from `state` on. Returns 0 when the recipe (or run.max_steps) is done, 128 + the signal's number when stopped by one."""
    incidents = IncidentLog(recipe.run.dir, has_resumed=bool(state.source))
    tracker.earlier_incidents(incidents.numbers())
    tell_passed_over(recipe, state, tracker, incidents)
    beginning = None  # of the stage, where there is no checkpoint of it to roll back to
    while state.stage_index < len(recipe.stages):
        if recipe.run.max_steps is not None and state.step >= recipe.run.max_steps:
            break
        if state.stage_step == 0:
            beginning = deepcopy(state)
        incident = None
        try:
            signal_number = _run_stage(_Run(recipe, state, data, tracker, stop, device, sections, incidents))
        except RollBack as back:
            incident = back.incident
        if incident is not None:  # out here, where the exception and with it the model are gone
            sections.setup()
            state = roll_back(recipe, state, beginning, incident, tracker, incidents)
            continue
        if signal_number:
            return 128 + signal_number
        if not state.is_stage_done(recipe.stages[state.stage_index].steps):
            break  # run.max_steps
        if state.stage_index + 1 == len(recipe.stages):
            break
        state.finish_stage()
    return 0


def _run_stage(run: _Run) -> int:
    recipe, state, stage = run.recipe, run.state, run.stage
    if state.is_stage_done(stage.steps):
        return 0
    run.sections.setup()
    state.cursor = run.incidents.cursor_behind(stage.name, state)
    state.stage_names = [s.name for s in recipe.stages[: state.stage_index + 1]]
    layout = stage_layout(recipe.parallel, stage, recipe.model)
    if layout.split == "balanced":
        layout = settled_layout(recipe, state.stage_index, layout, dist.get_world_size(), run.data.indexes(stage))
    ctx = enter_grid(layout, run.device, recipe.run.seed)
    streams: list[StageStream] = []
    try:
        return _StageRun(run, _build(run, layout, ctx, streams)).run()
    finally:
        for stream in streams:
            stream.close()
        leave_grid()


def _build(run: _Run, layout: ParallelConfig, ctx: ParallelContext, streams: list[StageStream]) -> _Built:
    """The stage's model, data and watches. The stream is put into `streams` as soon as it is open: the caller closes it."""
    recipe, state, stage, tracker = run.recipe, run.state, run.stage, run.tracker
    memory = MemoryWatch(recipe, stage, layout, ctx)
    model = prepare_model(recipe, stage, layout, state, ctx)
    checkpointer = Checkpointer(recipe, stage, model, ctx)
    if recipe.precision.fp8 != "none":
        backend = choose_fp8(recipe.model, recipe.precision, layout, machine_of(run.device.type))
        tracker.message(f"stage {stage.name}: linear layers in FP8 ({recipe.precision.fp8} scales) through {backend}")
    stream = run.data.open_stage(stage, ctx, state)
    streams.append(stream)
    if ctx.rank == 0:
        # Only now: a resume that is refused must leave the run's recipe as it was.
        dump_recipe(recipe, Path(recipe.run.dir) / "recipe.yaml")
    tracker.stage_begins(stage.name, stage.steps, state.stage_step)
    if layout.pipeline > 1 and recipe.parallel.split == "balanced":
        tracker.message(f"layers of the pipeline's chunks, from the bottom of the model: {layout.layers_per_stage}")
    if stream.early_end is not None:
        tracker.message(f"warning: {stream.early_end}")
    held_out = run.data.held_out(stage, ctx)
    stream.tasks = sorted({*stream.tasks, *run.data.held_out_tasks})
    watch = StepWatch(recipe, stage, ctx, tracker, memory, run.incidents)
    return _Built(ctx, layout, model, stream, held_out, checkpointer, watch)


class _StageRun:
    """One stage at work."""

    def __init__(self, run: _Run, built: _Built) -> None:
        self.recipe, self.stage, self.state = run.recipe, run.stage, run.state
        self.tracker, self.stop, self.sections, self.incidents = run.tracker, run.stop, run.sections, run.incidents
        self.ctx, self.model, self.stream, self.held_out = built.ctx, built.model, built.stream, built.held_out
        self.checkpointer, self.watch = built.checkpointer, built.watch
        name = torch.cuda.get_device_name(self.ctx.device) if self.ctx.device.type == "cuda" else None
        self.accountant = Accountant(self.recipe, self.stage, self.ctx.grid.world_size, name, built.layout)
        self.judge = StepJudge(self.recipe.faults, self.state, self.ctx.device)
        self.answers = (
            HeldOutAnswers(self.recipe, self.stage, built.layout, self.model, self.stream.tokenizer, self.ctx, self.tracker)
            if self.held_out
            else None
        )

    def run(self) -> int:
        """Steps until the stage or its data are done, run.max_steps is reached or a signal came. Returns the signal's number or 0."""
        try:
            return self._steps()
        except (RollBack, TrainingFailure):
            # All ranks are here: what they were saving is good, and is finished.
            with self.sections.checkpoint():
                self._tell(self.checkpointer.wait(self.state))
            raise
        finally:
            self.watch.close()

    def _steps(self) -> int:
        is_first = self.state.stage_step == 0
        signal_number = 0
        while not self.state.is_stage_done(self.stage.steps) and not self._reached_max_steps() and not signal_number:
            try:
                # All ranks plan alike, so all of them end here.
                self._one_step(show_pictures=is_first)
            except EndOfData as end:
                self._end_early(end)
                break
            is_first = False
            self._compare_replicas_if_due()
            self._evaluate_if_due()
            signal_number, progress = self.stop.agreed(self.ctx.device, self.checkpointer.progress())
            self._tell(self.checkpointer.advance(progress, self.state))
            if not signal_number and not self._reached_max_steps():
                self._save_if_due()
        self.watch.end()
        # What is stopped goes on later: where checkpoints may be left out, this one may.
        is_saved = self._save(waits=True, is_last=not signal_number, without="the run stops without this checkpoint")
        if signal_number:
            done = "saved" if is_saved else "could not save"
            goes_on = "" if is_saved else f"; the next start goes on from {self._newest()}"
            self.tracker.message(f"signal {signal_number}: {done} step {self.state.step}, leaving{goes_on}")
        return signal_number

    def _end_early(self, end: EndOfData) -> None:
        self.state.stage_ended = True
        self.tracker.message(
            f"stage {self.stage.name} ended after {end.num_steps} of {self.stage.steps} steps: every source reached max_epochs; "
            f"{end.num_left_samples} samples that fill no whole step were left out"
        )
        self._evaluate_if_due()

    def _one_step(self, show_pictures: bool) -> None:
        self.sections.step()
        self.watch.begin_step(self.state.step + 1)
        start = time.perf_counter()
        with part("data"):
            data = self.stream.next()
        if show_pictures:
            log_sample_pictures(self.tracker, self.recipe, self.stage, data, self.stream.tokenizer, self.ctx)
        # Steps that were skipped were no updates: the schedule waits for them.
        rates = set_learning_rate(self.model.optimizer, self.stage, self.state.stage_step - self.state.stage_skipped)
        scale = scale_of(self.model.optimizer)
        self.judge.begin_step()
        loss, grad_norm = train_step(self.model, data.microbatches, self.stream.tasks, self.ctx, self.judge.allows)
        seconds = time.perf_counter() - start
        watched = self.watch.finish_step(data.plan, self.state.stage_step + 1)
        if warning := self.sections.step_done():
            self.tracker.message(f"warning: {warning}")
        self.state.step += 1
        self.state.stage_step += 1
        self.state.cursor = dict(data.plan.cursor_after)
        if grad_norm is None:
            self.state.stage_skipped += 1
        self._record(data, loss, grad_norm, rates, seconds, scale, watched)
        if self.judge.finding is not None:
            self._settle(self.judge.finding, loss, data)
        elif grad_norm is None:
            self._skipped(scale)
        else:
            self.judge.accept(loss.loss, grad_norm)

    def _settle(self, finding: Finding, loss: StepLoss, data: StepData) -> None:
        """Tell of a step that was not updated for what was found in it; raises TrainingFailure or RollBack where it says so."""
        incident = settle(finding, data.plan, self.ctx.data_rank, loss.bad_microbatches, self.recipe.faults, self.state, self.incidents)
        self.tracker.incident(
            incident["kind"],
            self.state.step,
            f"{describe(incident)}: no update ({self.state.stage_skipped} of {self.state.stage_step} steps of this stage skipped)",
        )

    def _skipped(self, scale: float | None) -> None:
        """Tell of a step whose fp16 gradients overflowed; raises TrainingFailure where no smaller loss scale is allowed."""
        if scale is not None and scale <= self.recipe.precision.loss_scale.minimum:
            raise TrainingFailure(
                f"step {self.state.step} (stage {self.stage.name}): fp16 gradients overflow at precision.loss_scale.minimum={scale:g}: "
                "the model itself overflows fp16. Set precision.dtype=bf16, or lower the learning rate"
            )
        self.tracker.message(
            f"step {self.state.step}: fp16 gradients overflowed at loss scale {scale:g}, no update; the scale is now "
            f"{scale_of(self.model.optimizer):g} ({self.state.stage_skipped} of {self.state.stage_step} steps of this stage skipped)"
        )

    def _record(
        self,
        data: StepData,
        loss: StepLoss,
        grad_norm: float | None,
        rates: dict[str, float],
        seconds: float,
        scale: float | None,
        watched: dict[str, Any],
    ) -> None:
        pack_tokens = self.stream.pack_tokens
        scaling: dict[str, Any] = {} if scale is None else {"loss_scale": scale}
        if scale is not None or self.state.stage_skipped:
            scaling["skipped_steps"] = self.state.stage_skipped
        if grad_norm is None:
            scaling["skipped"] = "overflow" if self.judge.finding is None else self.judge.finding.kind
        self.tracker.step(
            {
                "step": self.state.step,
                "stage": self.stage.name,
                "stage_step": self.state.stage_step,
                "loss": loss.loss,
                **({"z_loss": loss.z_loss} if self.stage.loss.z_loss else {}),
                **({} if grad_norm is None else {"grad_norm": grad_norm}),
                **scaling,
                "lr": rates,
                **self.accountant.record(data.plan, seconds, data.wait_s, pack_tokens, self.ctx.grid.context),
                **watched,
                "images": self.stream.count_images(data.plan),
                "task_loss": loss.by_task,
                "source_samples": self.stream.count_sources(data.plan),
                "plan": dict(data.plan.statistics),
            }
        )

    def _compare_replicas_if_due(self) -> None:
        every = self.recipe.faults.replica_hash_every_steps
        if every is not None and self.state.step % every == 0:
            with self._whole_parameters(), self.watch.memory.aside():
                check_replicas(self.model, self.ctx, self.recipe.faults, self.state, self.tracker, self.incidents)

    def _evaluate_if_due(self) -> None:
        every = self.recipe.evaluation.every_steps
        if not self.held_out or every is None:
            return
        is_due = self.state.stage_step % every == 0 or (self.recipe.checkpoint.keep_best > 0 and self.checkpointer.is_due(self.state))
        # When data end right behind a step that was due, that step's measurement is the last.
        if is_due == self.state.stage_ended and self.state.stage_step != self.stage.steps:
            return
        with self.sections.evaluation(), self._whole_parameters(), self.watch.memory.aside():
            loss = measure(self.model.chunks, [d.microbatches for d in self.held_out], self.stream.tasks, self.ctx)
        self.checkpointer.measured(self.state.step, loss.loss)
        self.tracker.evaluation(
            {"step": self.state.step, "stage": self.stage.name, "loss": loss.loss, "targets": loss.num_targets, "task_loss": loss.by_task}
        )
        if self.answers is not None and self.answers.are_wanted:
            with self.sections.evaluation(), self._whole_parameters(), self.watch.memory.aside():
                self.answers.after(self.state.step)

    def _reached_max_steps(self) -> bool:
        limit = self.recipe.run.max_steps
        return limit is not None and self.state.step >= limit

    def _save_if_due(self) -> None:
        if self.checkpointer.is_due(self.state):
            self._save(waits=not self.recipe.checkpoint.asynchronous)
        elif self.checkpointer.is_local_due(self.state):
            with self.sections.checkpoint(), self._whole_parameters(), self.watch.memory.aside():
                self.checkpointer.begin_local(self.state)

    def _save(self, *, waits: bool, is_last: bool = False, without: str = _GOES_ON) -> bool:
        """Begin to save; returns whether it has been, where it is waited for. `without`: what follows where it could not be."""
        if self.checkpointer.is_busy:
            start = time.perf_counter()
            with self.sections.checkpoint():
                self._tell(self.checkpointer.wait(self.state))
            self.tracker.message(f"saving step {self.state.step} waited {time.perf_counter() - start:.1f} s for the save before it")
        with self.sections.checkpoint(), self._whole_parameters(), self.watch.memory.aside():
            self.checkpointer.begin(self.state)
            outcome = self.checkpointer.wait(self.state, is_last=is_last) if waits else None
            self._tell(outcome, without)
        return outcome is not None and outcome.error is None

    def _newest(self) -> str:
        """Where a start goes on that comes now, in words."""
        newer = "" if self.recipe.checkpoint.local is None else ", or a newer one on the nodes' own disks"
        return (self.state.checkpoint or "the beginning") + newer

    def _tell(self, outcome: Outcome | None, without: str = _GOES_ON) -> None:
        """Of a save that has ended. Local ones are told of only when they begin to fail, and when they do no more."""
        if outcome is None:
            return
        if outcome.is_local:
            news = self.checkpointer.local_news
            if news is not None and news.is_failure:
                self._tell_failure(news.text)
            elif news is not None:
                self.tracker.message(news.text)
        elif outcome.error is not None:
            self._tell_failure(f"{outcome.error}; {without}")
        else:
            self.tracker.message(f"saved {outcome.path.name} in {outcome.seconds:.1f} s, {outcome.stall_s:.2f} s of them without training")

    def _tell_failure(self, text: str) -> None:
        self.incidents.add({"kind": "save_failed", "step": self.state.step, "stage": self.stage.name, "text": text})
        self.tracker.incident("save_failed", self.state.step, text)

    def _whole_parameters(self) -> AbstractContextManager[None]:
        """Overlapped gathering updates parameters on their next use; whoever reads them otherwise needs them gathered first."""
        if not self.recipe.parallel.overlap_param_gather:
            return nullcontext()
        return _gathered(self.model)


@contextmanager
def _gathered(model: StageModel) -> Iterator[None]:
    for chunk in model.chunks:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in model.chunks:
            chunk.enable_forward_pre_hook()
