"""LM head + cross-entropy that never holds the full logits.

Rows are cut into chunks; each chunk's logits live only until its gradients are accumulated, so memory is one chunk
(Q_chunk x V) instead of Q x V, and the head is multiplied three times in all (forward, two gradients): nothing is
recomputed. This works because the loss weight of each row is an input: the upstream gradient of the weighted sum is then
one scalar, by which the gradients that were computed ahead are scaled. The idea of computing gradients in the forward
pass is Liger-Kernel's fused linear cross-entropy (https://arxiv.org/abs/2410.10989, section 3.2).

The vocabulary may be split over ranks (Megatron-LM's vocab-parallel cross-entropy, https://arxiv.org/abs/1909.08053,
section 3): maxima, denominators and target logits are then reduced over `group`, and the gradient of the hidden rows is
this rank's part, to be summed over `group` by the caller.

Shape legend: Q target rows, D hidden, V local rows of the vocabulary, J parts of a row's columns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megavlm_kernels.backend import uses_triton

CHUNK_ELEMENTS = 1 << 24
"""Elements of one chunk's logits on a CPU: 64 MiB in fp32, large enough to keep matmuls efficient."""
CUDA_CHUNK_ELEMENTS = 1 << 27
"""On a GPU: 256 MiB in bf16. Each chunk reads and writes the whole fp32 gradient of the weight, which for 110 rows of a 152k vocabulary
would take longer than its three matmuls; for 880 rows it is a fraction of them."""


class HeadLoss(NamedTuple):
    """All in fp32 (fp64 for fp64 inputs)."""

    total: torch.Tensor
    """Scalar, with gradient: sum over rows of weight x (loss + z-loss)."""
    loss_Q: torch.Tensor
    """Cross-entropy of each row, without gradient."""
    z_total: torch.Tensor
    """Scalar, without gradient: what of `total` is z-loss."""


class _Settings(NamedTuple):
    num_real: int
    """Columns of this rank that are no padding."""
    group: dist.ProcessGroup | None
    """None also where one rank has the whole vocabulary."""
    softcap: float | None
    z_loss: float


def linear_cross_entropy(
    hidden_QD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_Q: torch.Tensor,
    loss_weight_Q: torch.Tensor,
    *,
    vocab_size: int | None = None,
    vocab_start: int = 0,
    group: dist.ProcessGroup | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> HeadLoss:
    """Weighted sum of the losses, with gradients for `hidden_QD` and `weight_VD`, and the loss of each row.

    `target_Q` int64 holds global vocabulary ids; this rank owns ids vocab_start .. vocab_start + V - 1, of which those at
    and above `vocab_size` (None: no padding) are padding. Q may be 0. Accumulation is in fp32 whatever the inputs' dtype.
    With `softcap` logits are softcap x tanh(logit / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
    `z_loss` x log(Z)^2, Z the softmax's denominator, is added to each row's loss, which keeps logits from drifting (PaLM,
    https://arxiv.org/abs/2204.02311, section 5).
    """
    columns = weight_VD.shape[0]
    num_real = columns if vocab_size is None else min(max(vocab_size - vocab_start, 0), columns)
    is_split = group is not None and dist.get_world_size(group) > 1
    settings = _Settings(num_real, group if is_split else None, softcap, z_loss)
    found = _LinearCrossEntropy.apply(hidden_QD, weight_VD, target_Q - vocab_start, loss_weight_Q, settings)  # type: ignore[no-untyped-call]
    return HeadLoss(*found)


def chunk_rows(num_columns: int, device_type: str) -> int:
    """Rows whose logits exist at a time."""
    return max(1, (CUDA_CHUNK_ELEMENTS if device_type == "cuda" else CHUNK_ELEMENTS) // max(1, num_columns))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_QD: torch.Tensor,
        weight_VD: torch.Tensor,
        column_Q: torch.Tensor,
        loss_weight_Q: torch.Tensor,
        settings: _Settings,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        accumulate = torch.promote_types(hidden_QD.dtype, torch.float32)
        loss_weight_Q = loss_weight_Q.to(accumulate)
        num_rows, device = hidden_QD.shape[0], hidden_QD.device
        loss_Q, log_z_Q = torch.empty((2, num_rows), dtype=accumulate, device=device)
        grad_hidden = torch.empty_like(hidden_QD) if wants_hidden else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=accumulate, device=device) if wants_weight else None
        of_chunk = _chunk_by_triton if uses_triton(hidden_QD) else _chunk
        scale = _gradient_scale(loss_weight_Q) if weight_VD.dtype == torch.float16 else loss_weight_Q.new_ones(())
        scaled_weight_Q = loss_weight_Q * scale
        step = chunk_rows(weight_VD.shape[0], device.type)
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            hidden = hidden_QD[rows]
            logits = hidden @ weight_VD.T
            loss_Q[rows], log_z_Q[rows], grad_logits = of_chunk(
                logits, column_Q[rows], scaled_weight_Q[rows], settings, wants_hidden or wants_weight
            )
            if grad_logits is None:
                continue
            grad_logits = grad_logits.to(weight_VD.dtype)
            if grad_hidden is not None:
                torch.mm(grad_logits, weight_VD, out=grad_hidden[rows])
            if grad_weight is not None:
                _add_product(grad_weight, grad_logits.T, hidden)
        ctx.save_for_backward(grad_hidden, grad_weight, scale)
        ctx.weight_dtype = weight_VD.dtype
        z_total = settings.z_loss * (loss_weight_Q * log_z_Q.square()).sum()
        ctx.mark_non_differentiable(loss_Q, z_total)
        return (loss_Q * loss_weight_Q).sum() + z_total, loss_Q, z_total

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, *_: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight, scale = ctx.saved_tensors
        factor = grad_total / scale
        if grad_hidden is not None:
            # In fp16 the factor itself, a loss scale, can be infinite.
            grad_hidden = (grad_hidden.to(factor.dtype) * factor).to(grad_hidden.dtype)
        if grad_weight is not None:
            scaled = grad_weight * factor if _graph_is_kept() else grad_weight.mul_(factor)
            grad_weight = scaled.to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None


def _graph_is_kept() -> bool:
    """Whether this backward pass may come again (retain_graph): what was saved must stay. Else it is scaled where it lies: a second copy
    of the head's fp32 gradient would be the largest tensor of many models. The question is torch's own (functorch asks it so)."""
    asked = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return asked is None or bool(asked())


def _gradient_scale(loss_weight_Q: torch.Tensor) -> torch.Tensor:
    """Power of two by which fp16 gradients are computed, since the loss scale comes only with the backward pass: the largest loss weight
    becomes 512 to 1024, so that what is 1e-10 of it is still kept, and sums over a vocabulary stay far from 65504."""
    peak = torch.nn.functional.pad(loss_weight_Q.abs(), (0, 1)).max()
    return torch.where(peak > 0, torch.exp2((1024.0 / peak).log2().floor()), 1.0)


_Chunk = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""(loss of each row, log Z of each row, gradient of the weighted loss for the logits)."""


def _chunk(logits: torch.Tensor, column: torch.Tensor, loss_weight: torch.Tensor, settings: _Settings, wants_gradient: bool) -> _Chunk:
    """In plain torch; the logits' memory is used up where they are in the format of accumulation."""
    logits, slope = logits.to(loss_weight.dtype), None
    if settings.softcap is not None:
        logits = logits.div_(settings.softcap).tanh_()
        slope = 1.0 - logits.square() if wants_gradient else None
        logits *= settings.softcap
    logits[:, settings.num_real :] = float("-inf")
    owned = (column >= 0) & (column < settings.num_real)
    place = column.clamp(0, max(logits.shape[1] - 1, 0))[:, None]
    target_logit = torch.where(owned, logits.gather(1, place).squeeze(1), 0.0)
    peak = _reduced(logits.amax(dim=1), settings, dist.ReduceOp.MAX)
    logits -= peak[:, None]
    probability = logits.exp_()
    denominator, target_logit = _reduced(torch.stack([probability.sum(dim=1), target_logit]), settings)
    log_z = peak + denominator.log()
    if not wants_gradient:
        return log_z - target_logit, log_z, None
    # The target's own entry apart, so that a probability near 1 loses no more digits than it must.
    drift = 2.0 * settings.z_loss * log_z
    now = probability.gather(1, place).squeeze(1) / denominator
    now = torch.where(owned, (now - 1.0) + drift * now, now + drift * now) * loss_weight
    gradient = probability.mul_((loss_weight * (1.0 + drift) / denominator)[:, None])
    gradient.scatter_(1, place, now[:, None])
    if slope is not None:
        gradient *= slope
    return log_z - target_logit, log_z, gradient


def _chunk_by_triton(
    logits: torch.Tensor, column: torch.Tensor, loss_weight: torch.Tensor, settings: _Settings, wants_gradient: bool
) -> _Chunk:
    """By two kernels; the gradient takes the logits' place."""
    from megavlm_kernels.linear_cross_entropy import triton

    column = column.contiguous()
    peaks_QJ, sums_QJ, target_logit = triton.statistics(logits, column, settings.num_real, settings.softcap)
    peak = _reduced(peaks_QJ.amax(dim=1), settings, dist.ReduceOp.MAX)
    denominator = (sums_QJ * (peaks_QJ - peak[:, None]).exp()).sum(dim=1)
    denominator, target_logit = _reduced(torch.stack([denominator, target_logit]), settings)
    log_z = peak + denominator.log()
    if not wants_gradient:
        return log_z - target_logit, log_z, None
    drift = 2.0 * settings.z_loss * log_z
    rows = (logits, column, peak, denominator.contiguous(), drift, loss_weight.contiguous())
    return log_z - target_logit, log_z, triton.gradient_(*rows, settings.num_real, settings.softcap)


def _reduced(x: torch.Tensor, settings: _Settings, op: Any = dist.ReduceOp.SUM) -> torch.Tensor:
    """Over the ranks that share the vocabulary."""
    if settings.group is not None:
        dist.all_reduce(x, op=op, group=settings.group)
    return x


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b, where total may be in a wider format than a and b; summed in that format where the device can."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, out=total)  # not addmm_, which FLOP counters do not know
    elif a.is_cuda and _has_wide_product(a.dtype, a.device):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


@lru_cache(maxsize=16)
def _has_wide_product(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch.addmm adds a bf16 or fp16 product to fp32 in place here: asked by doing it once, since it came to torch by and by."""
    ones, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return bool((total == 17.0).all())
