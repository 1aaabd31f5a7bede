"""Where a run stands: the little that a checkpoint needs besides tensors."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from megavlm.checkpoint.resume import PassedOver
from megavlm.config.schema import Recipe


@dataclass
class RunState:
    """Position in the recipe. JSON-serialisable; a few KB, whatever the data set's size."""

    step: int = 0
    """Optimizer steps done over all stages."""
    stage_index: int = 0
    stage_step: int = 0
    """Optimizer steps done in the current stage."""
    stage_skipped: int = 0
    """Of these, steps that changed nothing (fp16 gradients that overflowed, faults.on_nonfinite and on_spike): the learning rate waited."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """loss and grad_norm of the stage's last steps, where faults.on_spike compares with them."""
    loss_scaler: dict[str, float] = field(default_factory=dict)
    """State of fp16's loss scaler; {} in other formats and before the first save of a stage."""
    stage_ended: bool = False
    """The current stage's data ended before its steps did: it trains no more."""
    cursor: dict[str, Any] | None = None
    """Where the stage's data go on; None at the beginning of a stage."""
    checkpoint: str = ""
    """Folder name of the newest checkpoint; "" before the first."""
    stage_names: list[str] = field(default_factory=list)
    """Stages that have begun, in order."""
    modules: dict[str, str] = field(default_factory=dict)
    """Module -> folder name of the newest checkpoint that holds it."""
    dtype: str = ""
    """precision.dtype of the run; the optimizer's masters belong to it."""
    model: dict[str, Any] = field(default_factory=dict)
    """The recipe's model block, to refuse a resume with another architecture."""

    source: str = ""
    """Folder that this state was read from; "" at the beginning of a run. Not stored."""
    warnings: list[PassedOver] = field(default_factory=list)
    """Checkpoints that were passed over for it. Not stored."""

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("source", "warnings")}

    @classmethod
    def from_json(cls, values: dict[str, Any], recipe: Recipe) -> RunState:
        """Raises ValueError when the recipe no longer fits: another architecture, or fewer stages than were done."""
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        state = cls(**known)
        now = recipe.model.model_dump(mode="json")
        changed = [f"model.{path}: {then!r} then, {here!r} now" for path, then, here in _differences(state.model, now)]
        if changed:
            raise ValueError("the checkpoint in run.dir was made with another model:\n  " + "\n  ".join(changed) + "\nuse another run.dir")
        if state.dtype and state.dtype != recipe.precision.dtype:
            raise ValueError(
                f"the run in run.dir was trained in {state.dtype}, and the recipe says precision.dtype={recipe.precision.dtype}: "
                "set it back, or use another run.dir"
            )
        names = [stage.name for stage in recipe.stages[: len(state.stage_names)]]
        if names != state.stage_names:
            raise ValueError(
                f"the run in run.dir has begun the stages {', '.join(state.stage_names)}, but the recipe begins with "
                f"{', '.join(names) or 'none'}: put new stages behind those that have begun, or use another run.dir"
            )
        if state.stage_index >= len(recipe.stages):
            raise ValueError(
                f"the checkpoint in run.dir is in stage number {state.stage_index + 1}, but the recipe has {len(recipe.stages)} stages: "
                "give the recipe its stages back, or use another run.dir"
            )
        return state

    def finish_stage(self) -> None:
        """Move to the beginning of the next stage."""
        self.stage_index, self.stage_step, self.stage_ended, self.cursor = self.stage_index + 1, 0, False, None
        self.stage_skipped, self.loss_scaler, self.recent = 0, {}, {}

    def is_stage_done(self, steps: int) -> bool:
        """Whether a stage of so many steps has nothing more to train."""
        return self.stage_ended or self.stage_step >= steps


def _differences(then: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found: list[tuple[str, Any, Any]] = []
    for key in sorted(set(then) | set(now)):
        a, b = then.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found
