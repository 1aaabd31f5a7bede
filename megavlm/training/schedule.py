"""Learning rate over the steps of a stage."""

from __future__ import annotations

import math

from megavlm.config.schema import StageConfig


def learning_rate(stage: StageConfig, stage_step: int) -> float:
    """Learning rate of update number `stage_step` (from 0), before each module's lr_scale.

    Warm-up is linear and reaches the peak at update `warmup_steps`; the decay reaches min_lr_fraction of the peak at the last update.
    """
    schedule, peak = stage.schedule, stage.optimizer.lr
    floor = peak * schedule.min_lr_fraction
    if stage_step < schedule.warmup_steps:
        return peak * (stage_step + 1) / (schedule.warmup_steps + 1)
    last = stage.steps - 1
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "wsd":
        decay = schedule.decay_steps if schedule.decay_steps is not None else max(1, stage.steps // 10)
        begin = max(schedule.warmup_steps, stage.steps - decay)
        if stage_step < begin:
            return peak
        return peak + (floor - peak) * (stage_step - begin + 1) / max(1, last - begin + 1)
    progress = (stage_step - schedule.warmup_steps) / max(1, last - schedule.warmup_steps)
    if schedule.kind == "linear":
        return peak + (floor - peak) * min(1.0, progress)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
