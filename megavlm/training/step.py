"""One optimizer step, or one measurement: microbatches through megatron-core's schedule, losses summed and shared.

Every microbatch returns (sum of weighted target losses, number of targets). megatron-core divides gradients once by the
number of targets of the whole global batch, so the loss does not depend on how samples fall on ranks and microbatches. Weights are
first scaled to a mean of 1 over the global batch: the loss is the weighted mean, sum(w x loss) / sum(w), and halving every weight
changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import to_local_if_dtensor

from megavlm.data.types import PackedBatch
from megavlm.models.layers.fp8 import constant_weights
from megavlm.models.vlm import TargetLoss, VisionLanguageModel
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.host import on_device
from megavlm.parallel.reductions import sum_over_data, sum_over_data_then_share
from megavlm.parallel.sharded import ShardedDataParallel
from megavlm.parallel.step_parts import turn_on_gradient
from megavlm.tracking.timers import part
from megavlm.training.build import StageModel
from megavlm.training.loss_scale import scaler_of


@dataclass(frozen=True)
class StepLoss:
    """Losses of a global batch, equal on every rank."""

    loss: float
    """Weighted mean of the cross-entropy over targets: with `z_loss` what the gradients belong to."""
    num_targets: int
    """Targets with a weight above 0."""
    by_task: dict[str, float]
    """Plain mean over each task's targets, for tasks that occurred."""
    z_loss: float = 0.0
    """What is added to `loss` for the gradients (LossConfig.z_loss), a weighted mean too."""
    bad_microbatches: tuple[int, ...] = ()
    """Where `loss` is not finite: those of this rank whose own loss is not. Other ranks have others."""


def forward_backward(
    chunks: Sequence[torch.nn.Module],
    microbatches: Sequence[PackedBatch],
    tasks: Sequence[str],
    ctx: ParallelContext,
    *,
    forward_only: bool = False,
) -> StepLoss:
    """Run the schedule. Gradients are left in the chunks, reduced and normalised, unless `forward_only`."""
    with part("copy"):
        batches = scale_weights([_own_pictures(chunks[0], b).to(ctx.device) for b in microbatches], ctx)
        rows = _message_rows(chunks[0], batches, ctx)
    task_number = {task: i for i, task in enumerate(tasks)}

    def forward_step(iterator: Iterator[tuple[int, PackedBatch]], model: torch.nn.Module) -> tuple[Any, Any]:
        number, batch = next(iterator)
        with part("language", number):
            output = model(batch, rows) if rows else model(batch)
        turn_on_gradient(output.total if isinstance(output, TargetLoss) else output, "language_backward", number)
        if not isinstance(output, TargetLoss):
            return output, None
        return output.total, lambda total: (total, *_report(batch, output, task_number, ctx))

    iterators = [enumerate(batches) for _ in chunks]
    config: Any = chunks[0].config
    with constant_weights(chunks):
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(batches),
            # megatron-core divides it by these ranks again.
            seq_length=rows * ctx.grid.context * (ctx.grid.tensor if config.sequence_parallel else 1),
            micro_batch_size=1,
            forward_only=forward_only,
        )
    sums = torch.zeros(3 + 2 * len(tasks), dtype=torch.float64, device=ctx.device)
    for report in reports:
        sums += report
    loss = _to_loss(sum_over_data_then_share(sums, ctx).tolist(), tasks)
    if math.isfinite(loss.loss):
        return loss
    return replace(loss, bad_microbatches=tuple(i for i, report in enumerate(reports) if not torch.isfinite(report).all()))


def _own_pictures(chunk: torch.nn.Module, batch: PackedBatch) -> PackedBatch:
    """The batch without pixels that other ranks encode: they need not be copied to the device."""
    module = getattr(chunk, "module", chunk)
    return module.keep_own_pictures(batch) if isinstance(module, VisionLanguageModel) else batch


def _message_rows(chunk: torch.nn.Module, batches: Sequence[PackedBatch], ctx: ParallelContext) -> int:
    """Rows of every message between pipeline stages: those that the step's largest microbatch needs; 0 where there are no messages."""
    if ctx.grid.pipeline == 1:
        return 0
    module: Any = chunk.module if isinstance(chunk, DistributedDataParallel | ShardedDataParallel) else chunk
    return max(module.message_rows(batch) for batch in batches)


def scale_weights(batches: Sequence[PackedBatch], ctx: ParallelContext) -> list[PackedBatch]:
    """The microbatches of every data rank with weights whose mean over the targets that count (weight above 0) is 1."""
    if not ctx.is_last_stage:
        return list(batches)
    weights = [b.target_weights_Q.double() for b in batches]
    sums = torch.stack([torch.stack([w.sum(), (w > 0).sum().double()]) for w in weights]).sum(0)
    # Context ranks hold the same batches: both sums count each of them as often.
    total, number = sum_over_data(sums, ctx).tolist()
    scale = number / total if total else 1.0
    return [replace(b, target_weights_Q=b.target_weights_Q * scale) for b in batches] if scale != 1.0 else list(batches)


def _report(batch: PackedBatch, output: TargetLoss, task_number: dict[str, int], ctx: ParallelContext) -> tuple[torch.Tensor, torch.Tensor]:
    """Number of targets for megatron-core, and [loss sum, targets, z-loss sum, then sum and count of each task] for people."""
    segments = batch.target_segments_Q[output.mine]
    counted = batch.target_weights_Q[output.mine] > 0
    number = counted.sum()
    sums = torch.zeros(3 + 2 * len(task_number), dtype=torch.float64, device=ctx.device)
    sums[0], sums[1], sums[2] = output.total.detach() - output.z_total, number, output.z_total
    if segments.numel():
        # Targets that do not count are added as zeros: to pick the others out, the host would have to know how many they are.
        task = on_device([task_number.get(name, 0) for name in batch.segment_tasks], ctx.device)[segments]
        sums[3::2].index_add_(0, task, torch.where(counted, output.loss_Q, 0.0).double())
        sums[4::2].index_add_(0, task, counted.double())
    return number.to(torch.int), sums


def _to_loss(sums: list[float], tasks: Sequence[str]) -> StepLoss:
    by_task = {task: sums[3 + 2 * i] / sums[4 + 2 * i] for i, task in enumerate(tasks) if sums[4 + 2 * i]}
    number = max(sums[1], 1.0)
    return StepLoss(sums[0] / number, int(sums[1]), by_task, sums[2] / number)


Judge = Callable[[float, float | None], bool]
"""Whether to go on towards the update, given the loss, and the gradient norm once it is known. Asked on all ranks together."""


def train_step(
    model: StageModel, microbatches: Sequence[PackedBatch], tasks: Sequence[str], ctx: ParallelContext, judge: Judge | None = None
) -> tuple[StepLoss, float | None]:
    """Forward, backward, and the update if `judge` allows it. Returns the losses and the gradient norm before clipping.

    The norm is None where no weight has changed: fp16 gradients overflowed, or `judge` said no.
    """
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    model.optimizer.zero_grad()
    loss = forward_backward(model.chunks, microbatches, tasks, ctx)
    with part("optimizer"):
        return loss, _update(model.optimizer, loss.loss, judge or (lambda loss, grad_norm: True))


@torch.no_grad()
def _update(optimizer: MegatronOptimizer, loss: float, allows: Judge) -> float | None:
    """megatron-core's `optimizer.step` with `allows` asked before anything changes. Returns the gradient norm; None without an update.

    In fp16 the loss alone is asked about first: the loss scale must not come down for what it is not the cause of.
    """
    if scaler_of(optimizer) is not None and not allows(loss, None):
        return None
    if optimizer.prepare_grads():
        return None
    grad_norm = float(optimizer.get_grad_norm())
    if not allows(loss, grad_norm):
        return None
    for part_ in getattr(optimizer, "chained_optimizers", [optimizer]):
        _clip(part_.get_parameters(), part_.config.clip_grad, grad_norm)
    return grad_norm if optimizer.step_with_ready_grads() else None


def _clip(parameters: Sequence[torch.Tensor], max_norm: float, norm: float) -> None:
    """Scale gradients in place, in one call for all of them; where Transformer Engine and Apex are missing, megatron-core writes scaled
    copies first, tensor by tensor."""
    coefficient = max_norm / (norm + 1e-6)
    gradients = [to_local_if_dtensor(p.grad) for p in parameters if p.grad is not None]
    if gradients and coefficient < 1.0:
        torch._foreach_mul_(gradients, coefficient)


@torch.no_grad()
def measure(
    chunks: Sequence[torch.nn.Module], steps: Sequence[Sequence[PackedBatch]], tasks: Sequence[str], ctx: ParallelContext
) -> StepLoss:
    """Losses over several global batches, without gradients."""
    for chunk in chunks:
        chunk.eval()
    try:
        losses = [forward_backward(chunks, batches, tasks, ctx, forward_only=True) for batches in steps]
    finally:
        for chunk in chunks:
            chunk.train()
    total = sum(x.num_targets for x in losses)
    by_task = {t: [x.by_task[t] for x in losses if t in x.by_task] for t in tasks}
    return StepLoss(
        sum(x.loss * x.num_targets for x in losses) / max(total, 1), total, {t: sum(v) / len(v) for t, v in by_task.items() if v}
    )
