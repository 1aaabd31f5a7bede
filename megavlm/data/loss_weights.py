"""How much one target counts: the sample's, its source's and its task's weights, and what is averaged over.

A step's loss is sum(weight * loss) / sum(weight) over all targets of the step, so only ratios of weights matter.
"""

from __future__ import annotations

import math
from typing import Literal

Averaging = Literal["token", "sample", "square"]
"""Names of recipe.stages[].loss.averaging."""


class LossWeightError(ValueError):
    """A weight that is no weight, or an unknown averaging."""


def target_weights(num_targets: int, sample_weight: float, source_weight: float, task_weight: float, averaging: Averaging) -> float:
    """Weight of each of a sample's `num_targets` targets.

    token: every target counts the same. sample: each counts 1/n, so every sample counts the same. square: 1/sqrt(n), between the two. All
    three times the weights of the sample, its source and its task. 0 for a sample without targets.
    Source: InternVL, internvl_chat/internvl/train/internvl_chat_finetune.py, `len2weight` (its argument is the number of targets).

    Raises:
        LossWeightError: an unknown averaging, or a weight that is negative or not finite.
    """
    weights = {"sample": sample_weight, "source": source_weight, "task": task_weight}
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise LossWeightError(f"the {name}'s loss weight is {weight}: give a finite number that is not negative")
    product = sample_weight * source_weight * task_weight
    if averaging not in ("token", "sample", "square"):
        raise LossWeightError(f"loss averaging {averaging!r} is not one of token, sample, square")
    if num_targets < 0:
        raise LossWeightError(f"a sample cannot have {num_targets} targets")
    if num_targets == 0:
        return 0.0
    return product * {"token": 1.0, "sample": 1 / num_targets, "square": 1 / math.sqrt(num_targets)}[averaging]
