"""Sharded data parallelism (ZeRO-2 and ZeRO-3, https://arxiv.org/abs/1910.02054) over torch's FSDP2, under megatron-core's schedules.

megatron-core has two of its own. Megatron-FSDP drives CUDA streams, events and memory pools itself and stores checkpoints in a format of
its own. Its wrapper of FSDP2 names a CUDA mesh, reduces gradients in the parameters' format, and divides them by the number of ranks,
which together with the division by the number of targets (`calculate_per_token_loss`) makes them too small. So the wrapping is done here,
and all else stays megatron-core's: schedules, `finalize_model_grads`, gradient norm and clipping, Adam.

Every parameter that trains is kept in fp32, split over data and context ranks along its first dimension; so are its gradient and its
moments. Layers gather their parameters in the format of computation when they run. Sums, not means, are reduced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.distributed.data_parallel_base import _BaseDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

_COMPUTE_DTYPE = "compute_dtype"
"""Mark on a sharded parameter."""


class ShardedDataParallel(_BaseDataParallel):
    """A model chunk whose parameters, gradients and optimizer state are split over data-parallel ranks.

    `units` gather their parameters when they run; the rest of the chunk does so at its beginning, until the end of its backward pass.
    Every rank must run the same units in every microbatch (see `touch`). With `keeps_gathered` (ZeRO-2) parameters stay whole from the
    first microbatch of a step to its last. `experts`, units or inside them, have copies on the ranks of `expert_group` only and are split
    over these; all else is split over `group`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ddp_config: DistributedDataParallelConfig,
        module: torch.nn.Module,
        units: Iterable[torch.nn.Module],
        *,
        group: dist.ProcessGroup,
        device: torch.device,
        keeps_gathered: bool,
        experts: Iterable[torch.nn.Module] = (),
        expert_group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(config=config, module=module)
        self.ddp_config, self.keeps_gathered = ddp_config, keeps_gathered
        computes = config.params_dtype
        reduces = torch.float32 if ddp_config.grad_reduce_in_fp32 else computes
        is_fp32 = computes == torch.float32
        policy = MixedPrecisionPolicy(
            param_dtype=None if is_fp32 else computes, reduce_dtype=None if is_fp32 else reduces, cast_forward_inputs=False
        )
        options: dict[str, Any] = {
            "mesh": _mesh(group, device),
            "mp_policy": policy,
            "reshard_after_forward": not keeps_gathered,
        }
        if expert_group is not None:
            expert_options = options | {"mesh": _mesh(expert_group, device)}
            for unit in experts:
                _shard(unit, computes, expert_options)
        for unit in units:
            _shard(unit, computes, options)
        _shard(module, computes, options | {"reshard_after_forward": False})
        for part in self._parts():
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)
            # All ranks reduce the same parameters, whatever their microbatch has reached; Adam then sees zeros, not nothing.
            part.set_reduce_scatter_unused_params(True, recurse=False)

    def _parts(self) -> list[FSDPModule]:
        return [m for m in self.module.modules() if isinstance(m, FSDPModule)]

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        """The chunk's forward pass."""
        output = self.module(*inputs, **kwargs)
        if not torch.is_grad_enabled():
            self.reshard()
        return output

    def reshard(self) -> None:
        """Keep only this rank's part of every parameter; the module's parameters are those parts then."""
        for part in self._parts():
            part.reshard()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Around all microbatches of a step but the last; gradients are reduced in each of them, or they would have to be kept whole."""
        root = self.module
        assert isinstance(root, FSDPModule)
        root.set_is_last_backward(False)
        if self.keeps_gathered:
            root.set_reshard_after_backward(False)
        try:
            yield
        finally:
            root.set_is_last_backward(True)
            root.set_reshard_after_backward(True)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """FSDP2 has reduced all gradients by the end of the backward pass. Only pending copies are waited for."""
        self.reshard()

    def scale_gradients(self, scaling_factor: float | torch.Tensor) -> None:
        """Multiply all gradients."""
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                _local(parameter.grad).mul_(scaling_factor)


def _mesh(group: dist.ProcessGroup, device: torch.device) -> DeviceMesh:
    """The group as a mesh of its own. torch keeps results of DTensor operations by mesh, and takes two of the same ranks for one unless
    their names differ: a parameter would be given the mesh of another grid, whose group may be gone."""
    return DeviceMesh.from_group(group, device.type, mesh_dim_names=(f"group_{group.group_name}",))


def _shard(module: torch.nn.Module, computes: torch.dtype, options: dict[str, Any]) -> None:
    """FSDP2 over what is not sharded yet below `module`; megatron-core's marks on parameters are kept."""
    marks = {}
    for name, parameter in module.named_parameters():
        if not isinstance(parameter, DTensor):
            marks[name] = dict(vars(parameter)) | {_COMPUTE_DTYPE: computes}
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    fully_shard(module, **options)
    for name, parameter in module.named_parameters():
        for mark, value in marks.get(name, {}).items():
            setattr(parameter, mark, value)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def compute_dtype(parameter: torch.Tensor) -> torch.dtype:
    """The format that a parameter is computed with; a sharded one may be kept in another."""
    dtype: torch.dtype = getattr(parameter, _COMPUTE_DTYPE, parameter.dtype)
    return dtype


def is_sharded(parameter: torch.Tensor) -> bool:
    """Does this rank hold a part of the parameter only?"""
    return isinstance(parameter, DTensor)


def local_part(tensor: torch.Tensor, parameter: torch.Tensor) -> tuple[torch.Tensor, int]:
    """This rank's part of something that is sharded as `parameter` is, and where it begins in the flattened whole.

    `tensor` is the parameter itself, or state of an optimizer: sharded like it, or this rank's part in host memory already.
    """
    assert isinstance(parameter, DTensor)
    rows = -(-parameter.shape[0] // parameter.device_mesh.size())
    first = min(parameter.device_mesh.get_local_rank() * rows, parameter.shape[0])
    local = _local(tensor.detach())
    assert local.is_contiguous()
    return local, first * (parameter.numel() // max(parameter.shape[0], 1))


@contextmanager
def stand_ins(chunks: Sequence[torch.nn.Module]) -> Iterator[dict[int, Any]]:
    """Parameters without values (torch's meta device), whole and in the format of computation, in the place of sharded ones; id of the
    stand-in -> the sharded one. For whoever asks a model of its parameters' names and shapes. Chunks that are not sharded stay as they are.
    """
    places: list[tuple[Any, str, Any]] = []
    by_parameter: dict[int, torch.nn.Parameter] = {}
    sharded: dict[int, Any] = {}
    for chunk in chunks:
        module = chunk.module if isinstance(chunk, ShardedDataParallel) else chunk
        if not isinstance(module, FSDPModule):
            continue
        inner: Any = module
        for part in inner.modules():
            if isinstance(part, FSDPModule):
                part.reshard()
        for owner in inner.modules():
            for name, parameter in owner._parameters.items():
                if isinstance(parameter, DTensor):
                    places.append((owner, name, parameter))
                    if id(parameter) not in by_parameter:
                        data = torch.empty(parameter.shape, dtype=compute_dtype(parameter), device="meta")
                        stand_in = torch.nn.Parameter(data, requires_grad=parameter.requires_grad)
                        for mark, value in vars(parameter).items():
                            setattr(stand_in, mark, value)
                        by_parameter[id(parameter)] = stand_in
                        sharded[id(stand_in)] = parameter
    for owner, name, parameter in places:
        owner._parameters[name] = by_parameter[id(parameter)]
    try:
        yield sharded
    finally:
        for owner, name, parameter in places:
            owner._parameters[name] = parameter
