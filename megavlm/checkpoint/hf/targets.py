"""Where a conversion may write: never over what it reads, and over nothing but a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from megavlm.checkpoint import folders
from megavlm.checkpoint.errors import HuggingFaceError
from megavlm.checkpoint.hf.reading import CONFIG

_OURS = (folders.STATE, "recipe.yaml", folders.CHECKPOINTS)
"""In a folder: it is a checkpoint or a run."""


def check_apart(target: Path, sources: Iterable[str | Path], around: Iterable[str | Path] = ()) -> None:
    """Writing `target`, and replacing it, must leave what is read alone.

    Args:
        target: the folder to write; beside it lies the unfinished one.
        sources: folders that are read: none of them may be, hold or lie in the target.
        around: folders in which a target may lie, as an export in the folder of its run, but which it may not be or hold.

    Raises:
        HuggingFaceError: one does; names both folders.
    """
    resolved = target.resolve()
    for written in (resolved, resolved.with_name(resolved.name + folders.UNFINISHED)):
        for source, inside in [*((Path(s), False) for s in sources), *((Path(s), True) for s in around)]:
            read = source.resolve()
            if written == read:
                raise HuggingFaceError(f"{target} is what is converted: give another folder to write")
            if written in read.parents:
                raise HuggingFaceError(f"{target} holds {source}, which is converted: give another folder to write")
            if read in written.parents and not inside:
                raise HuggingFaceError(f"{target} lies in {source}, which is converted: give a folder outside of it")


def check_free(target: Path, overwrite: bool) -> None:
    """The target must not be there, or be empty, or be a Hugging Face folder that may be overwritten. Raises HuggingFaceError."""
    if not target.exists():
        return
    if not target.is_dir():
        raise HuggingFaceError(f"{target} is a file: give a folder to write")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise HuggingFaceError(f"{target} is not empty: give another folder, or allow overwriting it (--overwrite)")
    ours = [name for name in _OURS if (target / name).exists()]
    if ours or not (target / CONFIG).is_file():
        why = f"it has {' and '.join(ours)}" if ours else f"it has no {CONFIG}"
        raise HuggingFaceError(f"{target} is no Hugging Face folder ({why}), and only such a folder is overwritten: give another one")
