"""Adam's moments, master weights and step count, read from and written to megatron-core's optimizers in the model's shapes.

All three optimizers (fp32, bf16 with masters, distributed) are seen alike: for each trained parameter a tensor `exp_avg`, a tensor
`exp_avg_sq` and, where the parameter is not fp32, a tensor `master`, each shaped as this rank's parameter. A checkpoint is
therefore independent of the optimizer's own layout. Learning rates and decay are settings of the recipe, not state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

from megavlm.parallel.sharded import compute_dtype, gathered, is_sharded, write_part

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"


class StateTensor(NamedTuple):
    """One tensor of optimizer state."""

    name: str
    """exp_avg, exp_avg_sq or master."""
    parameter: torch.nn.Parameter
    """The model's parameter that it belongs to."""
    tensor: torch.Tensor
    """Shaped as the parameter on this rank."""


def collect(optimizer: Any, *, for_loading: bool) -> list[StateTensor]:
    """Every state tensor of this rank, states created where Adam has none yet.

    Without `for_loading` the distributed optimizer's shards are gathered over its data-parallel group (all its ranks must call
    this). With it, the tensors are places to load into, to be handed to `put_back`.
    """
    found: list[StateTensor] = []
    for part in _parts(optimizer):
        _create_states(part.optimizer)
        if isinstance(part, DistributedOptimizer):
            found += _gathered(part, for_loading)
        else:
            for state in _plain(part):
                # All ranks of a sharded parameter's group hold a part of it, and each gathers the whole.
                tensor, parameter = state.tensor, state.parameter
                if is_sharded(parameter):
                    tensor = torch.zeros(parameter.shape, dtype=tensor.dtype) if for_loading else gathered(tensor, parameter)
                found.append(state._replace(tensor=tensor))
    return found


@torch.no_grad()
def put_back(optimizer: Any, loaded: Sequence[StateTensor], step: int) -> None:
    """Write tensors of `collect(for_loading=True)`, now filled, into the optimizer, and set Adam's step count."""
    by_place = {(s.name, id(s.parameter)): s.tensor for s in loaded}
    for part in _parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            for parameter, main, start, end in _shards(part):
                for name, target in _targets(part.optimizer, parameter, main).items():
                    target.copy_(by_place[name, id(parameter)].flatten()[start:end])
        else:
            for name, parameter, target in _plain(part):
                if is_sharded(parameter):
                    write_part(target, by_place[name, id(parameter)], parameter)
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


def _steps(adam: torch.optim.Optimizer) -> Iterator[int]:
    for group in adam.param_groups:
        if isinstance(group.get("step"), int | float):
            yield int(group["step"])
        for parameter in group["params"]:
            if "step" in adam.state.get(parameter, {}):
                yield int(adam.state[parameter]["step"])


def _targets(adam: torch.optim.Optimizer, parameter: torch.nn.Parameter, main: torch.Tensor) -> dict[str, torch.Tensor]:
    """The optimizer's own tensors of one parameter; the master only where it holds more than what is computed with."""
    tensors = {name: adam.state[main][name] for name in MOMENTS}
    return tensors if compute_dtype(parameter) == torch.float32 else tensors | {MASTER: main.data}


def _plain(part: Any) -> list[StateTensor]:
    if isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = [
            pair
            for halves, masters in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True)
            for pair in zip(halves, masters, strict=True)
        ]
        pairs += [(p, p) for group in part.fp32_from_fp32_groups for p in group]
    else:
        pairs = [(p, p) for group in part.optimizer.param_groups for p in group["params"]]
    return [StateTensor(name, p, tensor) for p, main in pairs for name, tensor in _targets(part.optimizer, p, main).items()]


def _shards(part: DistributedOptimizer) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor, int, int]]:
    """(parameter, this rank's main shard, its range in the flattened parameter) of every parameter that this rank updates."""
    for ranges_by_dtype in part.gbuf_ranges:
        for buckets in ranges_by_dtype.values():
            for bucket in buckets:
                for parameter, where in bucket["param_map"].items():
                    group, order = part.model_param_group_index_map[parameter]
                    yield parameter, part.optimizer.param_groups[group]["params"][order], where["param"].start, where["param"].end


def _gathered(part: DistributedOptimizer, empty: bool) -> list[StateTensor]:
    """Whole tensors from the shards, bucket by bucket; uninitialised ones of the same shapes when `empty`."""
    found: list[StateTensor] = []
    for buffer, ranges_by_dtype in zip(part.buffers, part.gbuf_ranges, strict=True):
        (bucket_ranges,) = ranges_by_dtype.values()
        for bucket, ranges in zip(buffer.buckets, bucket_ranges, strict=True):
            parameters = list(bucket.params_list)
            names = [*MOMENTS] if parameters[0].dtype == torch.float32 else [*MOMENTS, MASTER]
            for name in names:
                if empty:
                    found += [StateTensor(name, p, torch.zeros(p.shape, dtype=torch.float32)) for p in parameters]
                    continue
                whole = _gather_bucket(part, bucket.grad_data.numel(), ranges, name)
                for parameter in parameters:
                    start, end = (index - bucket.offset for index in buffer.param_index_map[parameter][:2])
                    found.append(StateTensor(name, parameter, whole[start:end].view(parameter.shape)))
    return found


def _gather_bucket(part: DistributedOptimizer, numel: int, ranges: dict[str, Any], name: str) -> torch.Tensor:
    """One kind of state of a whole bucket, padding included, on the CPU of every data-parallel rank."""
    group = part.data_parallel_group
    local = torch.zeros(numel // group.size(), dtype=torch.float32, device=_collective_device())
    for parameter, where in ranges["param_map"].items():
        index, order = part.model_param_group_index_map[parameter]
        main = part.optimizer.param_groups[index]["params"][order]
        source = _targets(part.optimizer, parameter, main)[name]
        local[where["gbuf_local"].start : where["gbuf_local"].end] = source.detach()
    whole = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(whole, local, group=group)
    return torch.cat(whole).cpu()
