"""What is done about a loss or gradient that is not a number, or a spike: decided on all ranks alike, before the update."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist

from megavlm.config.exits import Exit
from megavlm.config.faults import FaultsConfig
from megavlm.config.schema import Recipe
from megavlm.data.types import StepPlan
from megavlm.tracking.timers import part
from megavlm.tracking.tracker import Tracker
from megavlm.training.checkpointing import resume_point
from megavlm.training.incidents import IncidentLog, samples_of, suspects_of
from megavlm.training.state import RunState

_FINE, _SPIKE, _NONFINITE = 0, 1, 2


class TrainingFailure(RuntimeError):
    """Training cannot go on; the process ends with `exit_code`, and the message says it all."""

    def __init__(self, message: str, exit_code: int = Exit.FAULTS_EXHAUSTED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RollBack(Exception):
    """All ranks leave the stage, to enter it again at an earlier checkpoint and behind the data that were bad."""

    def __init__(self, incident: dict[str, Any]) -> None:
        super().__init__("roll back")
        self.incident = incident


@dataclass(frozen=True)
class Finding:
    """Why a step was not to update anything."""

    kind: Literal["nonfinite", "spike"]
    loss: float
    grad_norm: float | None
    """None: not computed."""
    medians: dict[str, float]
    """Of a spike: the running medians that it was compared with."""


class StepJudge:
    """Says of each step whether its update may be made. One stage's; every rank asks alike."""

    def __init__(self, config: FaultsConfig, state: RunState, device: torch.device) -> None:
        self.config, self.state, self.device = config, state, device
        self.finding: Finding | None = None
        """Of the last step; None: it was fine."""
        self._medians: dict[str, float] = {}

    def begin_step(self) -> None:
        self.finding = None
        recent = self.state.recent
        is_full = self.config.on_spike != "none" and len(recent.get("loss", ())) >= self.config.spike_window_steps
        self._medians = {name: median(values) for name, values in recent.items()} if is_full else {}

    def allows(self, loss: float, grad_norm: float | None) -> bool:
        """Whether to go on with the update; the norm is None where it is not known yet.

        Ranks share their answers: a fault that only one of them sees must not send it another way than the others.
        """
        values = [loss] if grad_norm is None else [loss, grad_norm]
        worst = _NONFINITE if not all(map(math.isfinite, values)) else _SPIKE if self._is_spike(loss, grad_norm) else _FINE
        shared = torch.tensor([worst], device=self.device)
        with part("communication"):
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
            worst = int(shared.item())
        if worst == _FINE:
            return True
        self.finding = Finding("spike" if worst == _SPIKE else "nonfinite", loss, grad_norm, self._medians if worst == _SPIKE else {})
        return False

    def _is_spike(self, loss: float, grad_norm: float | None) -> bool:
        limits = {"loss": self.config.loss_spike_factor, "grad_norm": self.config.grad_norm_spike_factor}
        values = {"loss": loss, "grad_norm": grad_norm}
        for name, usual in self._medians.items():
            limit, value = limits[name], values[name]
            if limit is not None and value is not None and value > limit * usual:
                return True
        return False

    def accept(self, loss: float, grad_norm: float) -> None:
        """The step was updated: its numbers are what later ones are compared with."""
        if self.config.on_spike == "none":
            return
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            values = self.state.recent.setdefault(name, [])
            values.append(value)
            del values[: -self.config.spike_window_steps]


def settle(
    finding: Finding,
    plan: StepPlan,
    data_rank: int,
    bad_microbatches: tuple[int, ...],
    config: FaultsConfig,
    state: RunState,
    log: IncidentLog,
) -> dict[str, Any]:
    """Note what was found in step `state.step` and what is done about it. Every rank calls this.

    Raises:
        TrainingFailure: the recipe says so, or too much was skipped or rolled back already.
        RollBack: the stage is to be entered again.
    """
    action = config.on_nonfinite if finding.kind == "nonfinite" else config.on_spike
    incident = {
        "kind": finding.kind,
        "action": action,
        "step": state.step,
        "stage": state.stage_names[-1],
        "stage_step": state.stage_step,
        "data_step": plan.step,
        "loss": finding.loss,
        "grad_norm": finding.grad_norm,
        **({"medians": finding.medians} if finding.medians else {}),
        "samples": samples_of(plan),
        "suspects": suspects_of(plan, data_rank, bad_microbatches),
    }
    name = "on_nonfinite" if finding.kind == "nonfinite" else "on_spike"
    why = f"faults.{name}={action}"
    if action != "stop":
        limit = "max_skips" if action == "skip" else "max_rollbacks"
        number = log.number_with(incident, config.window_steps)
        if number <= getattr(config, limit):
            if action == "rollback":
                raise RollBack(incident | {"cursor": dict(plan.cursor_after)})  # noted when it is known where it leads
            return log.add(incident)
        why += f", {number} of them within {config.window_steps} steps, and faults.{limit}={getattr(config, limit)}"
    log.add(incident | {"action": "stop"})
    raise TrainingFailure(
        f"{describe(incident)} ({why}). The update was not made, and no checkpoint was written for this step. All its samples are in "
        f"{log.path}. Take the bad ones out, let the recipe skip them (faults), or lower the learning rate"
    )


def tell_passed_over(recipe: Recipe, state: RunState, tracker: Tracker, log: IncidentLog) -> None:
    """Checkpoints that were not used when `state` was read are incidents."""
    stage = recipe.stages[min(state.stage_index, len(recipe.stages) - 1)].name
    for warning in state.warnings:
        log.add({"kind": warning.kind, "step": state.step, "stage": stage, "text": warning.text})
        tracker.incident(warning.kind, state.step, warning.text)


def roll_back(
    recipe: Recipe, state: RunState, beginning: RunState | None, incident: dict[str, Any], tracker: Tracker, log: IncidentLog
) -> RunState:
    """The state of the stage's newest checkpoint, or of its `beginning`. Where its data go on is the log's to say (`cursor_behind`).

    Raises TrainingFailure where neither is there any more.
    """
    keeps = recipe.checkpoint.model_copy(update={"resume": True})  # its own checkpoints, in the same run
    earlier = resume_point(recipe.model_copy(update={"checkpoint": keeps}))
    tell_passed_over(recipe, earlier, tracker, log)
    if earlier.stage_index != state.stage_index or earlier.stage_step == 0:
        if beginning is None:
            raise TrainingFailure(f"{describe(incident)}. There is nothing to roll back to: no checkpoint of this stage is left")
        earlier = deepcopy(beginning)
    log.add(incident | {"to_step": earlier.step})
    tracker.go_back(earlier.step)
    text = f"{describe(incident)}: back to step {earlier.step}, and on behind the data of step {incident['step']}"
    tracker.incident(incident["kind"], earlier.step, text)
    return earlier


def describe(incident: dict[str, Any]) -> str:
    """A bad step for people: its numbers, and the samples that are the likely culprits."""
    norm = "" if incident["grad_norm"] is None else f", gradient norm {incident['grad_norm']:.5g}"
    medians = ", ".join(f"{name} {value:.5g}" for name, value in incident.get("medians", {}).items())
    usual = f" (medians: {medians})" if medians else ""
    rows: dict[str, list[int]] = {}
    for suspect in incident["suspects"] or [{"samples": incident["samples"]}]:
        for source, found in suspect["samples"].items():
            rows.setdefault(source, []).extend(found)
    samples = "; ".join(
        f"{source} rows {', '.join(map(str, found[:6]))}{' ...' if len(found) > 6 else ''}" for source, found in rows.items()
    )
    whose = "microbatches with a bad loss of their own" if incident["suspects"] else "its samples"
    return f"step {incident['step']} (stage {incident['stage']}): loss {incident['loss']:.5g}{norm}{usual}, {whose}: {samples}"
