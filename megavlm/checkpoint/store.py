"""Save and load model, optimizer and state, in any parallel layout.

Tensors are stored by global keys (`language.decoder.layers.3...`, `optimizer.exp_avg.language...`) as boxes of whole tensors, so that a
checkpoint of any TP/PP/VPP/CP/EP/DP layout, with or without the distributed optimizer, loads into any other. No rank ever holds more of
the model than its layout gives it. Everything else is JSON. See `folders` for what lies on the disk, `saver` for saves that training
does not wait for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megavlm.checkpoint import folders, optimizer_state
from megavlm.checkpoint.errors import CheckpointError, Unreadable, some
from megavlm.checkpoint.folders import newest, read_state
from megavlm.checkpoint.pieces import OPTIMIZER, Piece, pieces_of
from megavlm.checkpoint.reader import CheckpointReader
from megavlm.checkpoint.saver import Saver
from megavlm.checkpoint.transfer import PieceReader
from megavlm.checkpoint.watchdog import watchdog
from megavlm.parallel.context import ParallelContext

__all__ = ["CheckpointError", "load", "module_folders", "newest", "read_state", "save"]


def save(
    path: str | Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: Any | None,
    state: dict[str, Any],
    ctx: ParallelContext,
    *,
    timeout_s: float = 600.0,
) -> Path:
    """Write a checkpoint and wait for it; every rank calls this with its chunks (wrapped or bare). Returns `path`.

    `state` is JSON-serialisable and equal on all ranks; `modules` (module -> folder name) is added when it is not there.
    A folder of the same name is replaced once the new one is complete.

    Raises:
        CheckpointError: a rank could not write; the message says which and why. Nothing has got the name `path` then.
    """
    with watchdog(f"saving {path}", timeout_s):
        saver = Saver(chunks, optimizer, ctx, timeout_s=timeout_s)
        saver.begin(Path(path), state)
        outcome = saver.wait()
    assert outcome is not None
    if outcome.error is not None:
        raise CheckpointError(outcome.error)
    return outcome.path


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
        Unreadable: the disk or the file server does not give it.
        CheckpointError: the folder is incomplete or damaged, or lacks tensors that the model or the optimizer needs.
    """
    path = Path(path)
    state: dict[str, Any] = everywhere(lambda: read_state(path), f"loading {path}")
    model, states = pieces_of(chunks, optimizer, ctx)
    wanted = [p for p in model if modules is None or p.key.split(".", 1)[0] in modules]

    def read() -> None:
        reader = PieceReader(path)
        _check_present(reader.reader, [*wanted, *states], state, modules)
        with _verified_beside(path) if verify else nullcontext():
            reader.fill(wanted)
            reader.fill(states)

    everywhere(read, f"loading {path}")
    if optimizer is not None:
        optimizer_state.set_step(optimizer, int(state["optimizer_step"]))
    return state


def verify_together(path: Path, ranks: Sequence[int]) -> None:
    """Compare checksums, each of `ranks` its share of the files; every rank calls this. Raises CheckpointError on all of them."""
    everywhere(lambda: _verify_share(path, ranks), f"loading {path}")


def _verify_share(path: Path, ranks: Sequence[int]) -> None:
    rank = dist.get_rank()
    if rank in ranks:
        folders.verify(path, folders.manifest_files(path)[ranks.index(rank) :: len(ranks)])


@contextmanager
def _verified_beside(path: Path) -> Iterator[None]:
    """This rank's share of the files is compared with its checksums meanwhile: a disk gives the bytes once for both.

    Damage that is found says more than any error that came of it.
    """
    with ThreadPoolExecutor(1) as beside:
        verified = beside.submit(_verify_share, path, range(dist.get_world_size()))
        try:
            yield
        finally:
            verified.result()


def _check_present(reader: CheckpointReader, pieces: Sequence[Piece], state: dict[str, Any], modules: set[str] | None) -> None:
    """Every tensor that is asked for must be in the checkpoint, in the same global shape."""
    entries, path = reader.entries, reader.path
    absent_modules = sorted((modules or set()) - set(state["held"]))
    if absent_modules:
        raise CheckpointError(f"{path} holds {', '.join(state['held'])}, not {', '.join(absent_modules)}")
    missing = list(dict.fromkeys(p.key for p in pieces if p.key not in entries))
    if any(key.startswith(OPTIMIZER) for key in missing):
        if not state["has_optimizer"]:
            raise CheckpointError(f"{path} was saved without an optimizer: load its weights only")
        masters = [k for k in missing if k.startswith(f"{OPTIMIZER}{optimizer_state.MASTER}.")]
        reason = "another precision.dtype" if len(masters) == len(missing) else "another set of trainable modules"
        raise CheckpointError(f"{path} has no optimizer state for {some(missing)}: it was saved with {reason}; load its weights only")
    if missing:
        raise CheckpointError(f"{path} lacks {some(missing)}: it holds another model than the recipe's model block describes")
    for piece in pieces:
        size = tuple(entries[piece.key].size)
        if size != piece.shape and not piece.is_padded:
            raise CheckpointError(f"{path}: {piece.key} has shape {size}, the recipe's model block makes it {piece.shape}")


def everywhere(action: Any, what: str) -> Any:
    """Run on every rank; when it fails on one, all raise the same error instead of waiting for that one.

    Raises:
        Unreadable: some ranks could not read, and none found anything wrong.
        CheckpointError: whatever else it was.
    """
    result, error = None, None
    try:
        result = action()
    except CheckpointError as raised:
        error = (isinstance(raised, Unreadable), str(raised))
    except Exception as raised:
        # Disk full, a damaged shard, an interrupted copy: whatever it is becomes one message.
        error = (False, f"{what}: rank {dist.get_rank()}: {type(raised).__name__}: {raised}")
    errors: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    found = sorted((e for e in errors if e is not None), key=lambda e: e[0])
    if found:
        is_unreadable, text = found[0]
        raise Unreadable(text) if is_unreadable else CheckpointError(text)
    return result


def module_folders(path: str | Path) -> dict[str, Path]:
    """Module -> folder of the checkpoint that holds it newest, as of this checkpoint, for every module of its run so far."""
    path = Path(path)
    state = read_state(path)
    # A checkpoint that was moved or renamed still finds itself.
    return {module: path if module in state["held"] else path.parent / name for module, name in state["modules"].items()}
