"""LM head + cross-entropy that never holds the full logits.

Rows are cut into chunks; each chunk's logits live only until its gradients are accumulated, so memory is one chunk
(Q_chunk x V) instead of Q x V, and the head is multiplied three times in all (forward, two gradients): nothing is
recomputed. This works because the loss weight of each row is an input: the upstream gradient of the weighted sum is then
one scalar, by which the gradients that were computed ahead are scaled. The idea of computing gradients in the forward
pass is Liger-Kernel's fused linear cross-entropy (https://arxiv.org/abs/2410.10989, section 3.2).

The vocabulary may be split over ranks (Megatron-LM's vocab-parallel cross-entropy, https://arxiv.org/abs/1909.08053,
section 3): maxima, denominators and target logits are then reduced over `group`, and the gradient of the hidden rows is
this rank's part, to be summed over `group` by the caller.

Shape legend: Q target rows, D hidden, V local rows of the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

# Elements of one chunk's logits: 2**24 fp32 numbers are 64 MiB, large enough to keep matmuls efficient.
CHUNK_ELEMENTS = 1 << 24


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weighted sum of the losses: scalar with gradient, loss of each row: (Q,) without), both in fp32 (fp64 for fp64 inputs).

    `target_Q` int64 holds global vocabulary ids; this rank owns ids vocab_start .. vocab_start + V - 1, of which those at
    and above `vocab_size` (None: no padding) are padding. Q may be 0. Accumulation is in fp32 whatever the inputs' dtype.
    With `softcap` logits are softcap x tanh(logit / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
    """
    arguments = (hidden_QD, weight_VD, target_Q, loss_weight_Q, vocab_size, vocab_start, group, softcap)
    return _LinearCrossEntropy.apply(*arguments)  # type: ignore[no-untyped-call]


def _chunk_rows(num_columns: int) -> int:
    return max(1, CHUNK_ELEMENTS // max(1, num_columns))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_QD: torch.Tensor,
        weight_VD: torch.Tensor,
        target_Q: torch.Tensor,
        loss_weight_Q: torch.Tensor,
        vocab_size: int | None,
        vocab_start: int,
        group: dist.ProcessGroup | None,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        accumulate = torch.promote_types(hidden_QD.dtype, torch.float32)
        num_rows, num_columns = hidden_QD.shape[0], weight_VD.shape[0]
        num_real = num_columns if vocab_size is None else min(max(vocab_size - vocab_start, 0), num_columns)
        loss_Q = torch.empty(num_rows, dtype=accumulate, device=hidden_QD.device)
        grad_hidden = torch.empty_like(hidden_QD) if wants_hidden else None
        grad_weight = torch.zeros(weight_VD.shape, dtype=accumulate, device=weight_VD.device) if wants_weight else None
        step = _chunk_rows(num_columns)
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            hidden, column = hidden_QD[rows], target_Q[rows] - vocab_start
            logits, slope = (hidden @ weight_VD.T).to(accumulate), None
            if softcap is not None:
                logits = logits.div_(softcap).tanh_()
                slope = 1.0 - logits.square() if wants_hidden or wants_weight else None
                logits *= softcap
            logits[:, num_real:] = float("-inf")
            loss_Q[rows], probability, owned = _softmax_loss(logits, column, num_real, group)
            if wants_hidden or wants_weight:
                probability[owned, column[owned]] -= 1.0
                grad_logits = probability.mul_(loss_weight_Q[rows, None])
                if slope is not None:
                    grad_logits *= slope
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits.to(weight_VD.dtype) @ weight_VD
                if grad_weight is not None:
                    if hidden.dtype == accumulate:
                        grad_weight.addmm_(grad_logits.T, hidden)
                    else:
                        grad_weight += (grad_logits.to(hidden.dtype).T @ hidden).to(accumulate)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight_VD.dtype
        total = (loss_Q * loss_weight_Q).sum()
        ctx.mark_non_differentiable(loss_Q)
        return total, loss_Q

    @staticmethod
    def backward(ctx: Any, grad_total: torch.Tensor, _grad_rows: torch.Tensor) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_total.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad_total).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _softmax_loss(
    logits: torch.Tensor, column: torch.Tensor, num_real: int, group: dist.ProcessGroup | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Loss of each row, the softmax (in place of the logits) and which rows' targets are columns of this rank."""
    is_split = group is not None and dist.get_world_size(group) > 1
    peak = logits.amax(dim=1)
    if is_split:
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
    logits -= peak[:, None]
    owned = (column >= 0) & (column < num_real)
    target_logit = torch.where(owned, logits.gather(1, column.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1), 0.0)
    probability = logits.exp_()
    denominator = probability.sum(dim=1)
    if is_split:
        both = torch.stack([denominator, target_logit])
        dist.all_reduce(both, group=group)
        denominator, target_logit = both[0], both[1]
    probability /= denominator[:, None]
    return denominator.log() - target_logit, probability, owned
