"""The rank's place in the grid, and megatron-core's start-up and shut-down around it.

This is the only module that touches `megatron.core.parallel_state` and chooses a device. Everything above asks the
`ParallelContext` it is handed.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from megavlm.config.schema import ParallelConfig, RunConfig
from megavlm.parallel import cpu
from megavlm.topology.grid import RankGrid


@dataclass(frozen=True)
class ParallelContext:
    """Where this rank stands and whom it talks to. Groups are torch process groups; a group of one is a valid group."""

    grid: RankGrid
    rank: int
    device: torch.device
    tensor_rank: int
    context_rank: int
    data_rank: int
    pipeline_rank: int
    tensor_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    data_context_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    microbatch_group: dist.ProcessGroup
    """Tensor and context ranks that share each microbatch, tensor first."""
    alone_group: dist.ProcessGroup | None = None
    """This rank alone, for modules that are whole on every tensor rank; None where the recipe asks for none."""

    @property
    def is_first_stage(self) -> bool:
        """Holds embeddings, encoder and projector."""
        return self.pipeline_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Holds the LM head and sees the loss."""
        return self.pipeline_rank == self.grid.pipeline - 1

    def chunk_position(self, chunk: int) -> tuple[bool, bool, int | None]:
        """(first of the model, last of the model, megatron's vp_stage) for this rank's virtual chunk `chunk`."""
        first = self.is_first_stage and chunk == 0
        last = self.is_last_stage and chunk == self.grid.virtual_pipeline - 1
        return first, last, chunk if self.grid.virtual_pipeline > 1 else None


def choose_device(run: RunConfig) -> torch.device:
    """The recipe's device; raises ValueError when CUDA is asked for and there is none."""
    has_cuda = torch.cuda.is_available()
    if run.device == "cuda" and not has_cuda:
        raise ValueError("run.device=cuda, but torch sees no CUDA device: use run.device=cpu or run on a GPU machine")
    if run.device == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def start_process_group(device: torch.device, timeout_s: float) -> None:
    """Join the default process group from RANK/WORLD_SIZE/MASTER_*; a lone process needs none of these. Idempotent."""
    if device.type == "cpu":
        cpu.install()
    else:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "nccl"
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
        return
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def enter_grid(parallel: ParallelConfig, device: torch.device, seed: int) -> ParallelContext:
    """Form megatron-core's groups over the running process group and seed its random-number trackers.

    Raises ValueError when the world size does not fit the grid.
    """
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    grid = RankGrid.from_config(parallel, dist.get_world_size())
    ps.initialize_model_parallel(
        tensor_model_parallel_size=grid.tensor,
        pipeline_model_parallel_size=grid.pipeline,
        virtual_pipeline_model_parallel_size=grid.virtual_pipeline if grid.virtual_pipeline > 1 else None,
        context_parallel_size=grid.context,
        expert_model_parallel_size=grid.expert,
        # Experts that are spread over ranks are whole there; gloo cannot gather tensor ranks' unequal numbers of tokens.
        expert_tensor_parallel_size=1 if grid.expert > 1 else grid.tensor,
        create_gloo_process_groups=True,
    )
    wants_alone = grid.tensor > 1 and (parallel.encoder_tensor is not None or parallel.encoder_data_parallel is not False)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelContext(
        grid=grid,
        rank=dist.get_rank(),
        device=device,
        tensor_rank=ps.get_tensor_model_parallel_rank(),
        context_rank=ps.get_context_parallel_rank(),
        data_rank=ps.get_data_parallel_rank(),
        pipeline_rank=ps.get_pipeline_model_parallel_rank(),
        tensor_group=ps.get_tensor_model_parallel_group(),
        context_group=ps.get_context_parallel_group(),
        data_group=ps.get_data_parallel_group(),
        data_context_group=ps.get_data_parallel_group(with_context_parallel=True),
        pipeline_group=ps.get_pipeline_model_parallel_group(),
        microbatch_group=ps.get_tensor_and_context_parallel_group(),
        alone_group=_enter_alone() if wants_alone else None,
    )


_alone: list[dist.ProcessGroup] = []


def _enter_alone() -> dist.ProcessGroup:
    """A group of this rank, made without asking the others."""
    _alone.append(dist.new_group([dist.get_rank()], use_local_synchronization=True))
    return _alone[-1]


@contextmanager
def whole_on_every_tensor_rank(ctx: ParallelContext) -> Iterator[None]:
    """megatron-core's modules that are built inside take this rank for the only tensor rank, for good.

    They look their group up when they are built and keep it. Only the attribute of megatron-core's global state reaches all of them,
    Transformer Engine's too: not every one takes a group as an argument.
    """
    from megatron.core import parallel_state as ps

    assert ctx.alone_group is not None, "the grid was entered without parallel.encoder_tensor or encoder_data_parallel"
    ps._TENSOR_MODEL_PARALLEL_GROUP = ctx.alone_group
    try:
        yield
    finally:
        ps._TENSOR_MODEL_PARALLEL_GROUP = ctx.tensor_group


def entered_group() -> dist.ProcessGroup | None:
    """Tensor-parallel group of the grid that this process is in; None outside one. Two grids at a time cannot be."""
    from megatron.core import parallel_state as ps

    group: dist.ProcessGroup | None = ps.get_tensor_model_parallel_group(check_initialized=False)
    return group


def entered_data_group() -> dist.ProcessGroup:
    """Data and context ranks of the grid that this process is in: those that hold copies of the same weights."""
    from megatron.core import parallel_state as ps

    group: dist.ProcessGroup = ps.get_data_parallel_group(with_context_parallel=True)
    return group


def entered_expert_group() -> dist.ProcessGroup:
    """Ranks of the grid that this process is in that hold copies of the same experts, where expert ranks share them (parallel.expert)."""
    from megatron.core import parallel_state as ps

    group: dist.ProcessGroup = ps.get_expert_data_parallel_group()
    return group


def leave_grid() -> None:
    """Dissolve megatron-core's groups, so that another grid can be entered (stages may differ in layout)."""
    from megatron.core import parallel_state as ps

    ps.destroy_model_parallel()
    while _alone:
        dist.destroy_process_group(_alone.pop())
    # A model is a reference cycle that holds its groups, and each gloo group a thread that wakes 100 times a second.
    gc.collect()


def stop_process_group() -> None:
    """Leave the default process group. Safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()
