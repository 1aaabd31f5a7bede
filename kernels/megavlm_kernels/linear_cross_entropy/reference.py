"""What `linear_cross_entropy` computes, in a few lines of torch; in fp64 it is the truth that tests compare with."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def linear_cross_entropy_reference(
    hidden_QD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_Q: torch.Tensor,
    loss_weight_Q: torch.Tensor,
    vocab_size: int | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weighted sum of losses and z-losses, loss of each row, weighted sum of z-losses); rows of `weight_VD` at and above `vocab_size`
    are padding and never win."""
    logits_QV = hidden_QD @ weight_VD[:vocab_size].T
    if softcap is not None:
        logits_QV = softcap * torch.tanh(logits_QV / softcap)
    loss_Q = F.cross_entropy(logits_QV, target_Q, reduction="none")
    z_total = z_loss * (loss_weight_Q * logits_QV.logsumexp(1).square()).sum()
    return (loss_Q * loss_weight_Q).sum() + z_total, loss_Q.detach(), z_total.detach()
