"""Adam's moments, master weights and step count in megatron-core's optimizers, wherever they lie.

All three optimizers (fp32, bf16 with masters, distributed) are seen alike: for each trained parameter a tensor `exp_avg`, a tensor
`exp_avg_sq` and, where the parameter is not fp32, a tensor `master`; or as much of them as this rank holds, a stretch of the flattened
parameter. A checkpoint is therefore independent of the optimizer's own layout. Learning rates and decay are settings of the recipe,
not state.

megatron-core's own ways are not used: `DistributedOptimizer.load_state_dict` gives all parameters one shared `step` tensor (Adam then
counts N steps an update), its `state_dict` asserts on a rank that trains nothing or has not stepped yet, `fully_reshardable` raises
KeyError 'step' with torch's Adam, and its world tensors drop the padding between buckets but are cut by indices that count it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from megavlm.parallel.sharded import compute_dtype, is_sharded, local_part

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"


class StateTensor(NamedTuple):
    """One tensor of optimizer state, the optimizer's own: what is written to it, the optimizer has."""

    name: str
    """exp_avg, exp_avg_sq or master."""
    parameter: torch.nn.Parameter
    """The model's parameter that it belongs to."""
    tensor: torch.Tensor
    """Shaped as the parameter on this rank; or this rank's stretch of it, contiguous."""
    start: int | None
    """First element of the stretch in the flattened parameter; None: the tensor is whole."""


def tensors(optimizer: Any) -> list[StateTensor]:
    """Every state tensor of this rank, states created where Adam has none yet."""
    found: list[StateTensor] = []
    for part in _parts(optimizer):
        _create_states(part.optimizer)
        if isinstance(part, DistributedOptimizer):
            for parameter, main, start in _shards(part):
                found += [StateTensor(name, parameter, t, start) for name, t in _targets(part.optimizer, parameter, main).items()]
        else:
            for name, parameter, tensor in _plain(part):
                start = None
                if is_sharded(parameter):
                    tensor, start = local_part(tensor, parameter)
                found.append(StateTensor(name, parameter, tensor, start))
    return found


def set_step(optimizer: Any, step: int) -> None:
    """Adam has made so many updates."""
    for part in _parts(optimizer):
        _set_step(part.optimizer, step)


def read_step(optimizer: Any) -> int:
    """Adam's updates so far: the same on all ranks, also on those that train nothing.

    Raises ValueError when parameters disagree, which no checkpoint can hold.
    """
    steps = {step for part in _parts(optimizer) for step in _steps(part.optimizer)}
    if len(steps) > 1:
        raise ValueError(f"Adam's step count differs between parameters ({sorted(steps)}): the optimizer's state is damaged")
    box = torch.tensor([max(steps, default=0)], dtype=torch.int64, device=_collective_device())
    dist.all_reduce(box, op=dist.ReduceOp.MAX)
    return int(box.item())


def _collective_device() -> torch.device:
    return torch.device("cpu") if dist.get_backend() == "gloo" else torch.device("cuda", torch.cuda.current_device())


def _parts(optimizer: Any) -> list[Any]:
    """megatron-core's optimizers inside a chain, without those of ranks that train nothing."""
    parts = [p for p in getattr(optimizer, "chained_optimizers", [optimizer]) if not getattr(p, "is_stub_optimizer", False)]
    known = (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)
    for part in parts:
        assert isinstance(part, known), f"{type(part).__name__} has no checkpoint format here"
        assert not part.config.use_precision_aware_optimizer, "the precision-aware optimizer keeps its masters elsewhere"
    return parts


def _create_states(adam: torch.optim.Optimizer) -> None:
    """Zero moments for parameters that Adam has not updated yet, as its own first step would create them."""
    per_parameter_step = isinstance(adam, torch.optim.Adam | torch.optim.AdamW)
    for group in adam.param_groups:
        if not per_parameter_step:
            group.setdefault("step", 0)
        for parameter in group["params"]:
            state = adam.state[parameter]
            if MOMENTS[0] in state:
                continue
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if per_parameter_step:
                state["step"] = _step_tensor(group, parameter, 0)


def _step_tensor(group: dict[str, Any], parameter: torch.Tensor, step: int) -> torch.Tensor:
    """A tensor of its own for each parameter: a shared one would be incremented once per parameter."""
    on_device = group.get("fused") or group.get("capturable")
    return torch.tensor(float(step), dtype=torch.float32, device=parameter.device if on_device else "cpu")


def _set_step(adam: torch.optim.Optimizer, step: int) -> None:
    for group in adam.param_groups:
        if "step" in group or not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
            group["step"] = step
        for parameter in group["params"]:
            if "step" in adam.state[parameter]:
                adam.state[parameter]["step"] = _step_tensor(group, parameter, step)


def _steps(adam: torch.optim.Optimizer) -> set[int]:
    """Every step count that a group or a parameter has; tensors on a device are asked all at once."""
    groups = {int(group["step"]) for group in adam.param_groups if isinstance(group.get("step"), int | float)}
    counts = [state["step"] for group in adam.param_groups for p in group["params"] if "step" in (state := adam.state.get(p, {}))]
    by_device: dict[torch.device, list[torch.Tensor]] = {}
    for count in counts:
        count = torch.as_tensor(count, dtype=torch.float32)
        by_device.setdefault(count.device, []).append(count.reshape(()))
    return groups.union(*({int(n) for n in torch.stack(c).unique().tolist()} for c in by_device.values()))


def _targets(adam: torch.optim.Optimizer, parameter: torch.nn.Parameter, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """The optimizer's own tensors of one parameter; the master only where it holds more than what is computed with."""
    tensors = {name: adam.state[main][name] for name in MOMENTS}
    return tensors if compute_dtype(parameter) == torch.float32 else tensors | {MASTER: main.data}


def _plain(part: Any) -> list[tuple[str, torch.nn.Parameter, torch.Tensor]]:
    if isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [
            pair
            for halves, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
            for pair in zip(halves, masters, strict=True)
        ]
        pairs += [(p, p) for group in part.fp32_from_fp32_groups for p in group]
    else:
        pairs = [(p, p) for group in part.optimizer.param_groups for p in group["params"]]
    return [(name, p, tensor) for p, main in pairs for name, tensor in _targets(part.optimizer, p, main).items()]


def _shards(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int]]:
    """(parameter, this rank's main shard, where it begins in the flattened parameter) of every parameter that this rank updates."""
    for ranges_by_dtype in part.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, where in bucket["param_map"].items():
                    group, order = part.model_param_group_index_map[parameter]
                    yield parameter, part.optimizer.param_groups[group]["params"][order], where["param"].start
