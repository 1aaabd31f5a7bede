"""Faults on demand: a loss that goes wrong in a chosen step, in a chosen microbatch, without a hook in the code that trains."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from megavlm.data.types import StepData
from megavlm.models.vlm import TargetLoss, VisionLanguageModel
from megavlm.parallel.context import ParallelContext
from megavlm.tracking.timers import WallStamps
from megavlm.training.data import StageStream


@contextmanager
def bad_steps(factors: Mapping[int, float], *, data_rank: int = 0, microbatch: int = 0) -> Iterator[None]:
    """Losses, and with them gradients, of one microbatch of a data rank are multiplied by factors[data step] (from 0 over the stage).

    math.nan makes a loss that is not a number, 1e3 a spike. It follows the data: a step that is made again from the same samples goes wrong
    again, one that is made from others does not.
    """
    now: dict[str, Any] = {"factor": None, "calls": 0}
    next_data, forward, build = StageStream.next, VisionLanguageModel.forward, VisionLanguageModel.__init__

    def next_marked(self: StageStream) -> StepData:
        data = next_data(self)
        now.update(factor=factors.get(data.plan.step), calls=0)
        return data

    def build_marked(
        self: VisionLanguageModel, model: Any, precision: Any, parallel: Any, ctx: ParallelContext, *args: Any, **named: Any
    ) -> None:
        now["here"] = ctx.data_rank == data_rank
        build(self, model, precision, parallel, ctx, *args, **named)

    def forward_marked(self: VisionLanguageModel, *args: Any, **named: Any) -> Any:
        output = forward(self, *args, **named)
        if not isinstance(output, TargetLoss) or not self.training:
            return output
        number, now["calls"] = now["calls"], now["calls"] + 1
        if now["factor"] is None or number != microbatch or not now["here"]:
            return output
        return output._replace(total=output.total * now["factor"], loss_Q=output.loss_Q * now["factor"])

    with (
        patch.object(StageStream, "next", next_marked),
        patch.object(VisionLanguageModel, "__init__", build_marked),
        patch.object(VisionLanguageModel, "forward", forward_marked),
    ):
        yield


@contextmanager
def without_data_of(data_steps: set[int]) -> Iterator[None]:
    """The stage's data lack these steps: the oracle of what skips or leaves them out."""
    next_data = StageStream.next

    def next_other(self: StageStream) -> StepData:
        while (data := next_data(self)).plan.step in data_steps:
            pass
        return data

    with patch.object(StageStream, "next", next_other):
        yield


@contextmanager
def slow_rank(rank: int, seconds: float) -> Iterator[None]:
    """Each of this rank's forward passes takes so much longer, by the clock that times the parts of a step.

    That clock counts processor time of the thread that trains: a machine with other work makes nobody slow, and nobody sleeps.
    """
    forward, lost_s = VisionLanguageModel.forward, [0.0]

    def slow(self: VisionLanguageModel, *args: Any, **named: Any) -> Any:
        if self.ctx.rank == rank:
            lost_s[0] += seconds
        return forward(self, *args, **named)

    with (
        patch.object(VisionLanguageModel, "forward", slow),
        patch.object(WallStamps, "now", lambda self: time.thread_time() + lost_s[0]),
    ):
        yield


@contextmanager
def flipped_bit(step: int, rank: int, key: str, *, of_optimizer: bool = False) -> Iterator[None]:
    """Behind a step (from 1) of the process, the lowest bit of one element of this rank's part of a tensor is another.

    `key` is a part of the tensor's name in checkpoints. Raises ValueError where the rank has no such tensor.
    """
    from megavlm.checkpoint.pieces import pieces_of
    from megavlm.training import loop

    train_step, made = vars(loop)["train_step"], [0]

    def train_and_flip(model: Any, microbatches: Any, tasks: Any, ctx: ParallelContext, *judge: Any) -> Any:
        result = train_step(model, microbatches, tasks, ctx, *judge)
        made[0] += 1
        if made[0] == step and ctx.rank == rank:
            pieces = pieces_of(model.chunks, model.optimizer, ctx)
            found = [p for p in (pieces.optimizer if of_optimizer else pieces.model) if key in p.key]
            if not found:
                raise ValueError(f"rank {rank} holds no {key}")
            element = (
                found[0].tensor.view(-1)[:1] if found[0].tensor.is_contiguous() else found[0].tensor[(slice(0, 1),) * found[0].tensor.dim()]
            )
            kind = {2: torch.int16, 4: torch.int32}[element.element_size()]
            element.view(kind).bitwise_xor_(1)
        return result

    with patch.object(loop, "train_step", train_and_flip):
        yield


NAN = math.nan
