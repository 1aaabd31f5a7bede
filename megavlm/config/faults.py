"""The recipe's faults block: what a run does about bad losses, hangs, slow ranks and replicas that differ."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from megavlm.config.blocks import Block, PositiveFloat, PositiveInt

Factor = Annotated[float, Field(gt=1)]


class WatchdogConfig(Block):
    """How long the sections of a run may take. A rank that is in one for longer writes its stacks to <run.dir>/stacks and ends with exit
    code 77. A save has its own limit, checkpoint.timeout_s. None: no limit."""

    setup_s: PositiveFloat | None = 600.0
    """From the start to a stage's first step: indexes, model, reading a checkpoint. Build the indexes of large data ahead of the run, with
    `megavlm data index`."""
    first_step_s: PositiveFloat | None = 600.0
    """The first step of a start: it starts up libraries and compiles kernels."""
    step_s: PositiveFloat | None = 180.0
    """Any other step, waiting for its data included. A step that takes more than half of it is told once."""
    evaluation_s: PositiveFloat | None = 600.0
    """A measurement of held-out loss; then, anew, the answers behind it (evaluation.num_answers)."""


class FaultsConfig(Block):
    """What is done when training goes wrong. Every incident is a line of <run.dir>/incidents.jsonl."""

    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"
    """A loss or gradient norm that is NaN or infinite. stop: the run ends before the update. skip: the step updates nothing, and the
    learning rate waits for it. rollback: the newest checkpoint of the stage (without one: its beginning) is loaded, and training goes on
    behind the data of the bad step. Gradients that overflow in fp16 are the loss scale's to mend, and no incident."""
    on_spike: Literal["none", "skip", "rollback"] = "none"
    """A loss or gradient norm far above its running median, as the factors below say. none: is not looked for."""
    loss_spike_factor: Factor | None = 2.0
    """So many times the median is a spike. None: the loss is not looked at."""
    grad_norm_spike_factor: Factor | None = 10.0
    """The same for the gradient norm before clipping."""
    spike_window_steps: Annotated[int, Field(ge=4)] = 50
    """Steps of the median. Nothing is a spike before the stage has made so many."""
    max_skips: PositiveInt = 5
    """More skipped steps than this within window_steps end the run, with exit code 78."""
    max_rollbacks: PositiveInt = 2
    """More rollbacks than this within window_steps end the run, with exit code 78."""
    window_steps: PositiveInt = 1000
    """Incidents that lie further back are not counted. They are remembered over restarts."""
    watchdog: WatchdogConfig = Field(default_factory=WatchdogConfig)
    straggler_factor: Factor | None = 1.5
    """A rank that computes so many times as long as the median rank of its pipeline stage is named. None: none is. Needs
    tracking.step_parts, and two ranks in a stage."""
    straggler_reports: PositiveInt = 3
    """In so many reports in a row (one every tracking.log_every_steps): pictures fall unevenly on ranks from step to step."""
    replica_hash_every_steps: PositiveInt | None = None
    """Ranks compare hashes of the parameters that they hold copies of (all over data ranks, norms and the like over tensor ranks). The
    hash of a parameter is exact, and is computed where it lies. None: never."""
    on_divergence: Literal["stop", "report"] = "stop"
    """Copies that differ. stop: exit code 79, without a checkpoint. report: go on, and tell."""

    @model_validator(mode="after")
    def _spikes_can_be_seen(self) -> FaultsConfig:
        if self.on_spike != "none" and self.loss_spike_factor is None and self.grad_norm_spike_factor is None:
            raise ValueError(f"on_spike={self.on_spike} without loss_spike_factor and grad_norm_spike_factor: nothing would be a spike")
        return self
