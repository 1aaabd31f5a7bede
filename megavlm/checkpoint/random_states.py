"""The states of a rank's random number generators, as one tensor of a checkpoint (`random.<rank>`).

A step draws no random number today. What a module of one's own draws (dropout, noise) goes on where it was all the same: Python's, numpy's,
torch's and CUDA's generators, and megatron-core's for tensor and expert ranks. The tensor holds the bytes of a safetensors file: nothing
in it can run code.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from safetensors import SafetensorError
from safetensors.numpy import load as unpacked
from safetensors.numpy import save as packed

from megavlm.checkpoint.boxes import Box
from megavlm.checkpoint.errors import CheckpointError
from megavlm.checkpoint.pieces import Piece
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.parallel.context import ParallelContext

_log = logging.getLogger(__name__)
PREFIX = "random."
"""Begins the keys of random states."""
_MEGATRON = "megatron."


class RandomStates:
    """Those of this process, for saves of one stage."""

    def __init__(self, ctx: ParallelContext) -> None:
        self._ctx = ctx
        found = _captured(ctx)
        self._names = set(found)
        data = packed(found)
        self._bytes = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        shape = (len(data),)
        self.piece = Piece(f"{PREFIX}{ctx.rank}", torch.uint8, shape, Box((0,), shape), self._bytes, is_padded=False, is_copy=False)

    def refresh(self) -> None:
        """Let the piece hold the states of now: of the generators that there were at the beginning, its size must stay."""
        data = packed({name: state for name, state in _captured(self._ctx).items() if name in self._names})
        assert len(data) == len(self._bytes), "a generator of the stage's beginning is gone"
        self._bytes.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))


def grid_of(ctx: ParallelContext) -> list[int | str]:
    """What must be the same for a rank to go on with its own states: ranks, sizes of the grid's axes, and the kind of device."""
    grid = ctx.grid
    return [grid.world_size, grid.tensor, grid.pipeline, grid.context, grid.expert, ctx.device.type]


def restore(path: Path, ctx: ParallelContext) -> bool:
    """Set this rank's generators to their states in a checkpoint.

    False where it has none, and where they are of other generators than this program has, of another version of a library say: then
    some of them may be set, and all ranks have to `seed_anew`.

    Raises:
        CheckpointError: they are damaged.
    """
    reader, key = CheckpointReader(path), f"{PREFIX}{ctx.rank}"
    if key not in reader.entries:
        return False
    try:
        found = unpacked(reader.tensor(key).numpy().tobytes())
    except SafetensorError as error:
        raise CheckpointError(f"{path}: the random states of rank {ctx.rank} cannot be read: {error}") from error
    try:
        _set(found, ctx)
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        why = f"{type(error).__name__}: {error}"
        text = "%s: the random states of rank %d are of other generators than there are here (%s): all are seeded anew"
        _log.warning(text, path, ctx.rank, why)
        return False
    return True


def seed_anew(seed: int, step: int, ctx: ParallelContext) -> None:
    """Seed all generators from the run's seed, the step and this rank's place.

    torch's are alike on the tensor and context ranks of a microbatch, where what they draw must agree; megatron-core's own differ there.
    """
    shared, own = (np.random.SeedSequence([seed, step, *place]) for place in ((ctx.data_rank, ctx.pipeline_rank), (ctx.rank,)))
    for_torch = int(shared.generate_state(1)[0]) >> 1
    for_python, for_numpy = map(int, own.generate_state(2))
    random.seed(for_python)
    np.random.seed(for_numpy)  # noqa: NPY002
    model_parallel_cuda_manual_seed(for_torch, force_reset_rng=True)
    torch.manual_seed(for_torch)  # behind it: on a CPU megatron-core seeds this very generator, and leaves it so


def _captured(ctx: ParallelContext) -> dict[str, np.ndarray[Any, Any]]:
    _, words, gauss = random.getstate()
    legacy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    found: dict[str, np.ndarray[Any, Any]] = {
        "python": np.array(words, dtype=np.uint32),
        "python.gauss": np.array([gauss is not None, gauss or 0.0], dtype=np.float64),
        "numpy": np.array(legacy["state"]["key"], dtype=np.uint32),
        "numpy.rest": np.array([legacy["state"]["pos"], legacy["has_gauss"], legacy["gauss"]], dtype=np.float64),
        "torch": torch.get_rng_state().numpy(),
    }
    if ctx.device.type == "cuda":
        found["cuda"] = torch.cuda.get_rng_state(ctx.device).numpy()
    for name, state in get_cuda_rng_tracker().get_states().items():
        found[_MEGATRON + name] = (state.get_state() if isinstance(state, torch.Generator) else state).cpu().numpy()
    return found


def _set(found: dict[str, np.ndarray[Any, Any]], ctx: ParallelContext) -> None:
    has_gauss, gauss = found["python.gauss"].tolist()
    random.setstate((3, tuple(found["python"].tolist()), gauss if has_gauss else None))
    position, has_gauss, gauss = found["numpy.rest"].tolist()
    np.random.set_state(("MT19937", found["numpy"], int(position), int(has_gauss), gauss))  # noqa: NPY002
    torch.set_rng_state(torch.tensor(found["torch"]))
    if ctx.device.type == "cuda":
        torch.cuda.set_rng_state(torch.tensor(found["cuda"]), ctx.device)
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    for name, state in states.items():
        values = torch.tensor(found[_MEGATRON + name])
        if isinstance(state, torch.Generator):
            state.set_state(values)
        elif values.shape != state.shape:  # the tracker looks at it when somebody draws, which is too late
            raise ValueError(f"{name} has {tuple(values.shape)} bytes of state, and had {tuple(state.shape)} when it was seeded")
        else:
            states[name] = values
    tracker.set_states(states)
