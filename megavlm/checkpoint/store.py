"""Save and load model, optimizer and state, in any parallel layout.

Tensors are stored by global keys (`language.decoder.layers.3...`, `optimizer.exp_avg.language...`) with megatron-core's
sharding metadata, so that a checkpoint of any TP/PP/VPP/CP/DP layout, with or without the distributed optimizer, loads into
any other. Everything else is JSON. See `folders` for what lies on the disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import save as save_sharded
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, apply_factories
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.utils import unwrap_model
from torch.distributed.checkpoint.api import CheckpointException

import megavlm
from megavlm.checkpoint import folders, optimizer_state
from megavlm.checkpoint.errors import CheckpointError, some
from megavlm.checkpoint.folders import newest, read_state
from megavlm.checkpoint.guarded import load_sharded
from megavlm.checkpoint.reader import read_metadata
from megavlm.checkpoint.watchdog import watchdog
from megavlm.models.weights import sharding_metadata
from megavlm.parallel.context import ParallelContext
from megavlm.parallel.mcore_fixes import in_process_save_strategy, install
from megavlm.parallel.reductions import union_over_ranks
from megavlm.parallel.sharded import whole_parameters

__all__ = ["CheckpointError", "load", "module_folders", "newest", "read_state", "save"]
_OPTIMIZER = "optimizer."


def save(
    path: str | Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any | None,
    state: dict[str, Any],
    ctx: ParallelContext,
    *,
    timeout_s: float = 600.0,
) -> Path:
    """Write a checkpoint; every rank calls this with its chunks (wrapped or bare). Returns `path`.

    `state` is JSON-serialisable and equal on all ranks; `modules` (module -> folder name) is added when it is not there.
    A folder of the same name is replaced once the new one is complete.

    Raises:
        CheckpointError: a rank could not write; the message says which and why. Nothing has got the name `path` then.
    """
    install()
    path = Path(path)
    unfinished = path.with_name(path.name + folders.UNFINISHED)
    with watchdog(f"saving {path}", timeout_s):
        _on_rank_zero(lambda: _fresh_folder(unfinished))
        with whole_parameters(chunks, write_back=False) as twins:
            bases = _model_bases(chunks, ctx)
        tensors = [t for base in bases.values() for t in _pieces(base)]
        step = 0
        if optimizer is not None:
            step = optimizer_state.read_step(optimizer)
            states = optimizer_state.collect(optimizer, for_loading=False)
            tensors += _optimizer_pieces(states, bases, twins)
        held = sorted(union_over_ranks(base.key.split(".", 1)[0] for base in bases.values()))
        strategy = FullyParallelSaveStrategyWrapper(in_process_save_strategy(), ctx.data_context_group)
        _everywhere(lambda: save_sharded(dict(enumerate(tensors)), str(unfinished), strategy), f"saving {path}")
        files = _checksums(unfinished)
        everything = {
            "format": folders.FORMAT,
            "megavlm_version": megavlm.__version__,
            "modules": dict.fromkeys(held, path.name),
            **state,
            "held": held,
            "has_optimizer": optimizer is not None,
            "optimizer_step": step,
        }
        _on_rank_zero(lambda: _finish(unfinished, path, everything, files))
    return path


def load(
    path: str | Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any | None,
    ctx: ParallelContext,
    *,
    modules: set[str] | None = None,
    verify: bool = True,
) -> dict[str, Any]:
    """Fill chunks (and optimizer) from a checkpoint and return its state; every rank calls this, with any layout.

    `modules` limits the load to these top-level modules (vision, projector, language, vision_head); ranks may hold none of
    them. Without an optimizer only weights are read: give it (or make it) afterwards, since a bf16 optimizer copies masters
    from the weights. `verify` compares checksums, each rank its share of the files.

    Raises:
        CheckpointError: the folder is incomplete or damaged, or lacks tensors that the model or the optimizer needs.
    """
    path = Path(path)
    install()
    state: dict[str, Any] = _everywhere(lambda: read_state(path), f"loading {path}")
    if verify:
        mine = folders.manifest_files(path)[dist.get_rank() :: dist.get_world_size()]
        _everywhere(lambda: folders.verify(path, mine), f"loading {path}")
    states: list[optimizer_state.StateTensor] = []
    with whole_parameters(chunks, write_back=True) as twins:
        bases = _model_bases(chunks, ctx)
        wanted = {key: base for key, base in bases.items() if modules is None or base.key.split(".", 1)[0] in modules}
        tensors = [t for base in wanted.values() for t in _pieces(base)]
        if optimizer is not None:
            states = optimizer_state.collect(optimizer, for_loading=True)
            tensors += _optimizer_pieces(states, bases, twins)
        _everywhere(lambda: _check_present(path, tensors, state, modules), f"loading {path}")
        _everywhere(lambda: _read_into(path, tensors), f"loading {path}")
    if optimizer is not None:
        optimizer_state.put_back(optimizer, states, int(state["optimizer_step"]))
    return state


def _model_bases(chunks: Sequence[torch.nn.Module], ctx: ParallelContext) -> dict[int, Any]:
    """Parameter id -> its sharded tensor (or factory of several). Objects (Transformer Engine's extra state) are left out."""
    bases: dict[int, Any] = {}
    for chunk in chunks:
        sharded = unwrap_model(chunk).sharded_state_dict(metadata=sharding_metadata(ctx))
        for base in nested_values(sharded):
            if isinstance(base, ShardedTensor | ShardedTensorFactory):
                bases[id(base.data)] = base
    return bases


def _pieces(base: Any) -> list[ShardedTensor]:
    """The sharded tensors of a base; a factory's are views of its data, so loading into them fills the parameter."""
    box = {"base": base}
    apply_factories(box)
    found = [t for t in nested_values(box) if isinstance(t, ShardedTensor)]
    for tensor in found:
        tensor.data = tensor.data.detach()
    return found


def _optimizer_pieces(
    states: Sequence[optimizer_state.StateTensor], bases: dict[int, Any], twins: dict[int, torch.nn.Parameter]
) -> list[ShardedTensor]:
    found: list[ShardedTensor] = []
    for name, parameter, tensor in states:
        base = bases[id(twins.get(id(parameter), parameter))]
        fields: dict[str, Any] = {"key": f"{_OPTIMIZER}{name}.{base.key}", "data": tensor}
        if isinstance(base, ShardedTensor):
            fields["dtype"] = tensor.dtype
        found += _pieces(replace(base, **fields))
    return found


def _read_into(path: Path, tensors: Sequence[ShardedTensor]) -> None:
    """Fill the tensors' data. Rows of vocabulary padding that the checkpoint lacks become zero."""
    for tensor in tensors:
        if tensor.allow_shape_mismatch:
            tensor.data.zero_()
    targets = [t.data for t in tensors]
    loaded = load_sharded(dict(enumerate(tensors)), path)
    for index, target in enumerate(targets):
        source = loaded[index]
        if source.data_ptr() != target.data_ptr():
            target.copy_(source.view(target.shape))


def _check_present(path: Path, tensors: Sequence[ShardedTensor], state: dict[str, Any], modules: set[str] | None) -> None:
    """Every tensor that is asked for must be in the checkpoint, in the same global shape."""
    entries = read_metadata(path).state_dict_metadata
    absent_modules = sorted((modules or set()) - set(state["held"]))
    if absent_modules:
        raise CheckpointError(f"{path} holds {', '.join(state['held'])}, not {', '.join(absent_modules)}")
    missing = [t.key for t in tensors if t.key not in entries]
    if any(key.startswith(_OPTIMIZER) for key in missing):
        if not state["has_optimizer"]:
            raise CheckpointError(f"{path} was saved without an optimizer: load its weights only")
        masters = [k for k in missing if k.startswith(f"{_OPTIMIZER}{optimizer_state.MASTER}.")]
        reason = "another precision.dtype" if len(masters) == len(missing) else "another set of trainable modules"
        raise CheckpointError(f"{path} has no optimizer state for {some(missing)}: it was saved with {reason}; load its weights only")
    if missing:
        raise CheckpointError(f"{path} lacks {some(missing)}: it holds another model than the recipe's model block describes")
    for tensor in tensors:
        size = tuple(entries[tensor.key].size)  # type: ignore[union-attr]
        if size != tuple(tensor.global_shape) and not tensor.allow_shape_mismatch:
            raise CheckpointError(f"{path}: {tensor.key} has shape {size}, the recipe's model block makes it {tuple(tensor.global_shape)}")


def _checksums(folder: Path) -> dict[str, Any]:
    """Manifest entries of all files, each rank hashing its share, on every rank."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file())
    mine = names[dist.get_rank() :: dist.get_world_size()]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, {name: folders.checksum(folder / name) for name in mine})
    return dict(sorted(item for share in shares for item in share.items()))


def _fresh_folder(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _finish(unfinished: Path, path: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
    folders.write_json(unfinished / folders.STATE, state)
    folders.write_json(unfinished / folders.MANIFEST, {"files": files})
    folders.publish(unfinished, path)


def _on_rank_zero(action: Any) -> None:
    """Run on rank 0; all ranks wait for it and fail with it."""
    _everywhere(lambda: action() if dist.get_rank() == 0 else None, "checkpoint")


def _everywhere(action: Any, what: str) -> Any:
    """Run on every rank; when it fails on one, all raise the same CheckpointError instead of waiting for that one."""
    result, error = None, None
    try:
        result = action()
    except CheckpointError as raised:
        error = str(raised)
    except (Exception, CheckpointException) as raised:  # torch's own is a BaseException
        # Disk full, a damaged shard, an interrupted copy: whatever it is becomes one message.
        error = f"{what}: rank {dist.get_rank()}: {type(raised).__name__}: {raised}"
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    first = next((e for e in errors if e is not None), None)
    if first is not None:
        raise CheckpointError(first)
    return result


def module_folders(path: str | Path) -> dict[str, Path]:
    """Module -> folder of the checkpoint that holds it newest, as of this checkpoint, for every module of its run so far."""
    path = Path(path)
    state = read_state(path)
    # A checkpoint that was moved or renamed still finds itself.
    return {module: path if module in state["held"] else path.parent / name for module, name in state["modules"].items()}
