"""AdamW whose moments are in host memory and whose update is computed there."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.tensor import DTensor


class HostAdam(torch.optim.AdamW):
    """Takes the place of an AdamW: same groups (the very same objects), same checkpoints, moments on the CPU.

    In a step gradients and weights are copied to the host, one parameter ahead of the update, and weights back behind it. Nothing of
    the weights is remembered there from step to step, so that whoever changes them (a checkpoint that is loaded) need not know of this.
    Sharded parameters are updated in this rank's part.

    megatron-core's HybridDeviceOptimizer is not used: its checkpoints are of a format of their own, and it never runs without a GPU.
    """

    def __init__(self, adam: torch.optim.Optimizer) -> None:
        super().__init__([{"params": [torch.nn.Parameter(torch.zeros(1))]}])
        self.param_groups, self.state = adam.param_groups, adam.state
        self._pinned: dict[torch.Tensor, tuple[torch.Tensor, torch.Tensor]] = {}
        for group in self.param_groups:
            # Of the GPU's kernels: the update runs on the CPU, where the fused one is for plain tensors.
            group["fused"], group["foreach"] = False, False
            for parameter in group["params"]:
                if not self.state[parameter]:
                    like = _local(parameter)
                    moments = {name: torch.zeros(like.shape, dtype=torch.float32) for name in ("exp_avg", "exp_avg_sq")}
                    self.state[parameter] = moments | {"step": torch.tensor(0.0)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        work = [(group, p) for group in self.param_groups for p in group["params"] if p.grad is not None]
        arriving = self._to_host(work[0][1]) if work else None
        for number, (group, parameter) in enumerate(work):
            assert arriving is not None
            weight, gradient, event = arriving
            if number + 1 < len(work):
                arriving = self._to_host(work[number + 1][1])
            if event is not None:
                event.synchronize()
            state = self.state[parameter]
            torch._fused_adamw_(
                [weight],
                [gradient],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [],
                [_next(state["step"])],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            _local(parameter).copy_(weight, non_blocking=True)

    def _to_host(self, parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        """(weight, gradient) in host memory, and what to wait for before they are read."""
        local, gradient = _local(parameter), _local(parameter.grad)
        is_cuda = local.is_cuda
        if parameter not in self._pinned:
            new = [torch.empty(local.shape, dtype=torch.float32, pin_memory=is_cuda) for _ in range(2)]
            self._pinned[parameter] = (new[0], new[1])
        weight, grad = self._pinned[parameter]
        weight.copy_(local, non_blocking=True)
        grad.copy_(gradient, non_blocking=True)
        return weight, grad, torch.cuda.current_stream(local.device).record_event() if is_cuda else None


def _next(step: torch.Tensor) -> torch.Tensor:
    return step.add_(1)


def _local(tensor: Any) -> torch.Tensor:
    local: torch.Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local
